// A pool of threads that share the pieces of one task at a time.

#pragma once

#include <functional>

namespace mlxarch {

// Number of threads, the caller's included; at least 1. Threads are started at the first use.
void set_threads(int count);
int threads();

// Run task(piece) for every piece from 0 to pieces - 1, on the calling thread and those of the pool.
// Pieces are handed out one by one, so that a thread that another process slows down takes fewer.
// If another thread is using the pool, the caller runs all pieces itself.
void run_pieces(int pieces, const std::function<void(int)>& task);

} // namespace mlxarch
