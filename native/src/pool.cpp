#include "pool.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace mlxarch {

namespace {

constexpr auto SPIN = std::chrono::microseconds(50);  // before a thread sleeps

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A ticket is the number of the task (upper half) and of its next piece (lower half). A thread that
// wakes late finds a ticket of another task, or none left, and touches nothing.
class Pool {
 public:
  void resize(int count) {
    std::lock_guard lock(busy_);
    wanted_ = count < 1 ? 1 : count;
  }

  int size() { return wanted_; }

  void run(int pieces, const std::function<void(int)>& task) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock || pieces < 2 || wanted_ < 2) {
      for (int piece = 0; piece < pieces; piece++) {
        task(piece);
      }
      return;
    }
    start_threads();
    task_ = &task;
    pieces_ = pieces;
    finished_ = 0;
    const uint64_t number = (ticket_.load() >> 32) + 1;
    ticket_.store(number << 32);
    ticket_.notify_all();
    work(number);
    while (finished_.load(std::memory_order_acquire) < pieces) {
      pause();
    }
  }

 private:
  void start_threads() {
#if defined(__unix__) || defined(__APPLE__)
    if (owner_ != getpid()) {  // a fork has no threads but the one that forked
      owner_ = getpid();
      started_ = 0;
    }
#endif
    for (; started_ < wanted_ - 1; started_++) {
      // Detached: a thread that can be joined when the process ends would abort it
      std::thread([this, index = started_] { serve(index); }).detach();
    }
  }

  void work(uint64_t number) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (ticket >> 32 == number && int(ticket & UINT32_MAX) < pieces_.load()) {
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
        (*task_.load())(int(ticket & UINT32_MAX));
        finished_.fetch_add(1, std::memory_order_release);
        ticket = ticket_.load(std::memory_order_acquire);
      }
    }
  }

  void serve(int index) {
    uint64_t seen = 0;
    while (true) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      auto begin = std::chrono::steady_clock::now();
      while (ticket >> 32 == seen) {
        if (std::chrono::steady_clock::now() - begin > SPIN) {
          ticket_.wait(ticket);
        } else {
          pause();
        }
        ticket = ticket_.load(std::memory_order_acquire);
      }
      seen = ticket >> 32;
      if (index < wanted_ - 1) {  // threads beyond a reduced size stay idle
        work(seen);
      }
    }
  }

  std::mutex busy_;
  std::atomic<int> wanted_{1};
  int started_ = 0;
  int owner_ = 0;
  std::atomic<const std::function<void(int)>*> task_{nullptr};
  std::atomic<int> pieces_{0};
  std::atomic<int> finished_{0};
  std::atomic<uint64_t> ticket_{0};
};

// Never destroyed: its threads may still run when the process ends
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

} // namespace

void set_threads(int count) {
  pool().resize(count);
}

int threads() {
  return pool().size();
}

void run_pieces(int pieces, const std::function<void(int)>& task) {
  pool().run(pieces, task);
}

} // namespace mlxarch
