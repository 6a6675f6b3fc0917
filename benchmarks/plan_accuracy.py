"""Predicted against measured peak memory, on models of many kinds with random weights.

    python benchmarks/plan_accuracy.py                 # all shapes, each in a process of its own
    python benchmarks/plan_accuracy.py "dense, 1k"     # the shapes that are named

The planner sees the folder of a checkpoint, a context and, for what is streamed, a limit. Then the model is loaded as
planned, its caches are filled but for the last turns of a conversation: a short one, and one whose prompt is a chunk,
or as much as passes through streamed layers together. Compared are MLX's own peak and the peak of the process (VmHWM of
Linux). It exits with 1 where MLX's is off by more than 5 %, the process's by more than 10 %, or either exceeds what the
model was allowed to use.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Matrix
from mlxarch.generation import pace
from mlxarch.generation.decode import decode
from mlxarch.generation.prefill import default_chunk
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.kv_cache import StateCache
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.planner.mlx_limits import set_limits
from mlxarch.planner.plan import Plan, Request
from mlxarch.planner.planner import TOKENIZER_ENTRY_BYTES
from mlxarch.quantization.scheme import Quantization
from mlxarch.store.lookup import blueprint_from_folder, plan_folder
from mlxarch.system.machines import parse_size

MLX, PROCESS = 0.05, 0.10  # by how much a prediction may be off
TOKENS = 3  # generated behind a prompt
COMMON = dict(vocab_size=16_000, rms_norm_eps=1e-6, max_position_embeddings=65_536, rope_theta=1e6)
QWEN3: dict[str, Any] = COMMON | dict(
    model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, tie_word_embeddings=True, attention_bias=False,
)  # fmt: skip
LONG = QWEN3 | dict(
    num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4
)  # for a CPU's patience
LLAMA4: dict[str, Any] = COMMON | dict(
    model_type="llama4_text", hidden_size=768, intermediate_size=1024, intermediate_size_mlp=2048, num_hidden_layers=4,
    num_attention_heads=12, num_key_value_heads=4, head_dim=64, num_local_experts=8, attention_chunk_size=2048,
    interleave_moe_layer_step=2, tie_word_embeddings=False,
)  # fmt: skip
GEMMA3: dict[str, Any] = COMMON | dict(
    model_type="gemma3_text", hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=1024, sliding_window_pattern=6,
    rope_local_base_freq=1e4, tie_word_embeddings=True,
)  # fmt: skip
GEMMA2: dict[str, Any] = COMMON | dict(
    model_type="gemma2", hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, query_pre_attn_scalar=64, sliding_window=1024, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, tie_word_embeddings=True,
)  # fmt: skip
DEEPSEEK: dict[str, Any] = COMMON | dict(
    model_type="deepseek_v3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=16, q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
    first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=4, n_group=1, topk_group=1,
    moe_intermediate_size=512, norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid",
    tie_word_embeddings=False, hidden_act="silu", attention_bias=False, topk_method="noaux_tc", moe_layer_freq=1,
)  # fmt: skip
LONG_LATENT = DEEPSEEK | dict(
    num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=256
)
MOE: dict[str, Any] = COMMON | dict(
    model_type="qwen3_moe", hidden_size=768, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
    num_key_value_heads=4, head_dim=64, moe_intermediate_size=384, num_experts=128, num_experts_per_tok=4,
    norm_topk_prob=True, tie_word_embeddings=False, hidden_act="silu", attention_bias=False,
)  # fmt: skip
LONG_MOE = MOE | dict(num_hidden_layers=2)
GPT_OSS: dict[str, Any] = COMMON | dict(
    model_type="gpt_oss", hidden_size=768, intermediate_size=768, num_hidden_layers=4, num_attention_heads=12,
    num_key_value_heads=4, head_dim=64, num_local_experts=32, num_experts_per_tok=2, sliding_window=128,
    tie_word_embeddings=False, hidden_act="silu",
)  # fmt: skip
GEMMA3N: dict[str, Any] = COMMON | dict(
    model_type="gemma3n_text", hidden_size=512, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=4,
    num_key_value_heads=2, head_dim=128, sliding_window=512, sliding_window_pattern=5, num_kv_shared_layers=5,
    activation_sparsity_pattern=[0.0] * 10, altup_num_inputs=4, hidden_size_per_layer_input=256, laurel_rank=64,
    vocab_size=65_536, vocab_size_per_layer_input=65_536, rope_local_base_freq=1e4, query_pre_attn_scalar=64,
)  # fmt: skip

QUARTER = dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25)
DELTA: dict[str, Any] = COMMON | dict(
    model_type="qwen3_5_text", hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, linear_num_key_heads=8, linear_num_value_heads=16, linear_key_head_dim=64,
    linear_value_head_dim=64, linear_conv_kernel_dim=4, rope_parameters=QUARTER, tie_word_embeddings=True,
)  # fmt: skip
KDA: dict[str, Any] = COMMON | dict(
    model_type="kimi_linear", hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=8,
    q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, num_experts=32,
    num_shared_experts=1, num_experts_per_token=4, first_k_dense_replace=1, moe_intermediate_size=512,
    moe_renormalize=True, routed_scaling_factor=2.4, tie_word_embeddings=False, hidden_act="silu",
    linear_attn_config=dict(
        kda_layers=[1, 2, 3, 5, 6, 7], num_heads=8, head_dim=128, short_conv_kernel_size=4
    ),
)  # fmt: skip
MAMBA: dict[str, Any] = COMMON | dict(
    model_type="nemotron_h", hidden_size=1024, intermediate_size=4096, hybrid_override_pattern="M-M*M-M-",
    num_attention_heads=8, num_key_value_heads=2, head_dim=128, mamba_num_heads=32, mamba_head_dim=64, n_groups=4,
    ssm_state_size=128, conv_kernel=4, tie_word_embeddings=False,
)  # fmt: skip
PARALLEL: dict[str, Any] = COMMON | dict(
    model_type="falcon_h1", hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=128, mamba_n_heads=24, mamba_d_ssm=1536, mamba_d_state=128, mamba_d_conv=4,
    tie_word_embeddings=True,
)  # fmt: skip
CONVOLUTION: dict[str, Any] = COMMON | dict(
    model_type="lfm2", hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=4, full_attn_idxs=[2, 5], conv_L_cache=3,
)  # fmt: skip

# name: config, bits of the matrices (16: not packed), context, and what is asked for
SHAPES: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "dense, 1k": (QWEN3, 16, 1024, {}),
    "dense, 8k": (QWEN3, 16, 8192, {}),
    "dense, 32k": (LONG, 16, 32_768, {}),
    "dense, 8k, KV 8": (LONG, 16, 8192, {"kv_bits": 8}),
    "dense, 32k, KV 4": (LONG, 16, 32_768, {"kv_bits": 4}),
    "sliding, 8k": (GEMMA3, 16, 8192, {}),
    "sliding, 32k, KV 8": (GEMMA3 | {"num_hidden_layers": 6}, 16, 32_768, {"kv_bits": 8}),
    "soft cap, 4k": (GEMMA2, 16, 4096, {}),
    "chunked, 8k": (LLAMA4, 16, 8192, {}),
    "latent, 4k": (DEEPSEEK, 4, 4096, {}),
    "latent, 16k": (LONG_LATENT, 4, 16_384, {}),
    "latent, 8k, KV 8": (LONG_LATENT, 4, 8192, {"kv_bits": 8}),
    "experts, 4k": (MOE, 4, 4096, {}),
    "experts streamed, 4k": (MOE, 4, 4096, {"memory": "450MB"}),
    "experts streamed, 16k, KV 4": (LONG_MOE, 4, 16_384, {"memory": "320MB", "kv_bits": 4}),
    "experts and sinks, 8k": (GPT_OSS, 4, 8192, {}),
    "per-layer embeddings, 2k": (GEMMA3N, 16, 2048, {"ple": "memory"}),
    "per-layer embeddings on the disk, 2k": (GEMMA3N, 16, 2048, {"ple": "ssd"}),
    "gated DeltaNet, 2k": (DELTA, 16, 2048, {}),
    "gated DeltaNet, 16k": (DELTA, 4, 16_384, {}),
    "KDA and experts, 2k": (KDA, 4, 2048, {}),
    "KDA and experts, 16k": (KDA, 4, 16_384, {}),
    "Mamba-2, 2k": (MAMBA, 16, 2048, {}),
    "Mamba-2, 16k": (MAMBA, 4, 16_384, {}),
    "Mamba-2 beside attention, 2k": (PARALLEL, 16, 2048, {}),
    "Mamba-2 beside attention, 16k": (PARALLEL, 4, 16_384, {}),
    "short convolutions, 2k": (CONVOLUTION, 16, 2048, {}),
    "short convolutions, 16k": (CONVOLUTION, 4, 16_384, {}),
}


def write(config: dict[str, Any], bits: int, folder: Path) -> None:
    """A checkpoint with random numbers, its matrices packed where ``bits`` are fewer than 16."""
    found = architecture(config)
    model, arrays = found.build(), dict[str, mx.array]()
    modules = dict(model.named_modules())
    for path, array in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        owner, name = modules[path.rpartition(".")[0]], found.published_name(path)
        if (
            bits < 16
            and isinstance(owner, Matrix)
            and owner.quantizable
            and path.endswith(".weight")
        ):
            form, stem = Quantization(bits, 64), name.removesuffix("weight")
            arrays[name] = mx.random.randint(0, 2**31, form.packed_shape(array.shape)).astype(
                mx.uint32
            )
            shape = form.scales_shape(array.shape)
            arrays[f"{stem}scales"] = mx.full(shape, 0.02 / 2**bits, mx.bfloat16)
            arrays[f"{stem}biases"] = mx.full(shape, -0.01, mx.bfloat16)
        else:
            arrays[name] = (mx.random.normal(array.shape) * 0.02).astype(mx.bfloat16)
        mx.eval(arrays)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    section = {"quantization": {"group_size": 64, "bits": bits}} if bits < 16 else {}
    (folder / "config.json").write_text(json.dumps(config | section))


def measure(folder: Path, context: int, asked: dict[str, Any]) -> dict[str, int]:
    """Plan, load, fill the caches, run the last chunk and generate."""
    os.environ.setdefault("MLXARCH_CPU_KERNELS", "off")  # they take less than MLX's own operations
    asked = asked | ({"memory": parse_size(asked["memory"])} if "memory" in asked else {})
    plan = plan_folder(folder, Request(context=context, **asked)).require()
    assert (plan.verdict == "streamed") == ("memory" in asked or asked.get("ple") == "ssd"), (
        plan.summary
    )
    set_limits(plan)
    model, _ = load_model(folder, execution=plan.execution)
    session = Session(
        model.make_caches(context, kv=plan.execution.kv), prefill_chunk=plan.execution.chunk
    )
    pace.EVALUATION_SECONDS = 600.0  # a plan is for the longest passes, those of a fast machine
    chunk = default_chunk()
    longest = min(
        plan.execution.segment or chunk, context - 3 * TOKENS
    )  # prompt that passes together
    fill(model, folder, session, context - longest - 3 * TOKENS, chunk)
    for new in (TOKENS, longest):  # in the second turn a session holds all that it can go back to
        prompt = [*session.tokens, *(token % 1000 for token in range(new))]
        for _ in decode(model, session, prompt, Sampling(), TOKENS):
            pass
    allowed = asked.get("memory", 0)
    return {
        **_figures(plan, folder),
        "measured_mlx": mx.get_peak_memory(),
        "measured_process": high_water(),
        "allowed": allowed,
    }


def _figures(plan: Plan, folder: Path) -> dict[str, int]:
    tokenizer = (
        TOKENIZER_ENTRY_BYTES * blueprint_from_folder(folder).footprint().vocab_size
    )  # there is none here
    return {
        "mlx": plan.mlx_peak,
        "process": plan.process_peak - tokenizer,
        "weights": sum(plan.weights.values()),
    }


def fill(model: CausalLM, folder: Path, session: Session, tokens: int, chunk: int) -> None:
    """Let the caches of a session hold so many tokens, without computing what they would be."""
    first = 0
    if tokens and session.has_states:  # a state has its size from the first token on
        model.hidden_state(mx.array([[7]]), session.caches)
        first = 1
    for cache, held in zip(
        session.caches, blueprint_from_folder(folder).footprint().caches, strict=True
    ):
        for part in cache.parts if cache is not None and held is not None else ():
            if isinstance(part, StateCache):
                mx.eval(part.arrays())
                part.length = tokens
                continue
            for start in range(first, tokens, chunk):
                count = min(chunk, tokens - start)
                shapes = [(1, heads, count, size) for heads, size in held.vectors]
                part.append(mx.ones(shapes[0]) * 0.1, mx.ones(shapes[-1]))
                mx.eval(part.arrays())
    session.tokens = [7] * tokens


def high_water() -> int:
    """The most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="SHAPE")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write or options.measure:
        config, bits, context, asked = SHAPES[options.names[0]]
        if options.write:
            write(config, bits, options.write)
        else:
            print(json.dumps(measure(options.measure, context, asked)))
        return
    print(
        f"MLX {mx.__version__}, {mx.default_device()}; MB and error for MLX's peak and for the process's"
    )
    failed = [name for name in options.names or SHAPES if not _compare(name)]
    print(
        f"{len(failed)} off by more than {MLX:.0%}, {PROCESS:.0%}, or above the limit: {', '.join(failed)}"
    )
    sys.exit(bool(failed))


def _compare(name: str) -> bool:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        for mode in ("--write", "--measure"):
            command = [sys.executable, __file__, name, mode, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    errors = [found[kind] / found[f"measured_{kind}"] - 1 for kind in ("mlx", "process")]
    sizes = [
        f"{found[key] / 1e6:7.0f}" for key in ("mlx", "measured_mlx", "process", "measured_process")
    ]
    within = not found["allowed"] or found["measured_process"] <= found["allowed"]
    sound = abs(errors[0]) <= MLX and abs(errors[1]) <= PROCESS and within
    text = f"{sizes[0]} {sizes[1]} {errors[0]:+7.1%}  {sizes[2]} {sizes[3]} {errors[1]:+7.1%}"
    print(f"{name:37} {text} {'' if sound else '  !'}", flush=True)
    return sound


if __name__ == "__main__":
    main()
