"""mlxarch slice, and --slice of the commands that load: what they write, what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlxarch
from mlxarch.loading.registry import architecture
from mlxarch.quantize import convert

KINDS = [*["sliding_attention"] * 4, "full_attention"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """35 layers of one width, as Gemma 3n E4B has them, that can talk, in 4 bits."""
    place = tmp_path_factory.mktemp("slices")
    shutil.copytree(tiny, place / "original")
    vocabulary = json.loads((place / "original" / "config.json").read_text())["vocab_size"]
    config: dict[str, Any] = {
        **{
            "model_type": "gemma3n_text",
            "num_hidden_layers": 35,
            "num_kv_shared_layers": 15,
            "hidden_size": 32,
        },
        **{
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
        **{
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 32,
            "altup_num_inputs": 2,
            "layer_types": KINDS * 7,
        },
        **{
            "activation_sparsity_pattern": [0.5] * 10 + [0.0] * 25,
            "sliding_window": 8,
            "rms_norm_eps": 1e-6,
        },
        **{
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
            "max_position_embeddings": 256,
        },
    }
    mx.random.seed(0)
    shapes = dict(tree_flatten(architecture(config).build().parameters()))
    weights = {name: mx.random.normal(value.shape) * 0.2 for name, value in shapes.items()}
    mx.save_safetensors(str(place / "original" / "model.safetensors"), weights)
    (place / "original" / "config.json").write_text(json.dumps(config))
    convert(place / "original", place / "whole", bits=4, group_size=32, method="round")
    return place / "whole"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "whole").symlink_to(whole)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "name", "layers", "widths"),
    [
        (["--to", "e2b"], "whole-e2b", 30, [64] * 30),
        (["--to", "E1.96B", "-o", "out"], "out", 30, [*[64] * 4, 128, *[64] * 25]),
        (["--ffn", "96"], "whole-slice", 35, [96] * 35),
        (["--skip-layers", "0,20-24,34"], "whole-slice", 28, [128] * 28),
        (
            ["--ffn", ",".join(["32"] * 10 + ["64"] * 24), "--skip-layers", "20"],
            "whole-slice",
            34,
            None,
        ),
    ],
    ids=["e2b", "output", "width", "layers", "both"],
)
def test_options_decide_what_is_kept_and_where(invoke, here, arguments, name, layers, widths):
    result = invoke("slice", "./whole", *arguments)
    assert result.exit_code == 0, result.stderr
    assert (
        result.stdout.startswith(f"{here / name}: ") and f"{layers} of 35 layers" in result.stderr
    )
    config = config_of(here / name)
    assert config["num_hidden_layers"] == layers and config["intermediate_size"] == (
        widths or [32] * 10 + [64] * 24
    )
    assert config["quantization"]["bits"] == 4
    assert "slice of" in (here / name / "README.md").read_text()


def test_a_slice_that_was_written_answers_as_one_made_at_load(invoke, here):
    assert invoke("slice", "./whole", "--to", "e2b").exit_code == 0
    question = ("Hi", "-n", "12", "--json", "--temp", "0")
    written, at_load, without = (
        json.loads(invoke("run", *arguments, *question).stdout)["text"]
        for arguments in (["./whole-e2b"], ["./whole", "--slice", "e2b"], ["./whole"])
    )
    assert written == at_load != without
    expected = mlxarch.load(here / "whole", slice="e2b").generate(
        [{"role": "user", "content": "Hi"}], max_tokens=12
    )
    assert at_load == expected.text


def test_the_summary_as_json(invoke, here):
    report = json.loads(invoke("slice", "./whole", "--to", "e2b", "--json").stdout)
    assert report["output"] == str(here / "whole-e2b")
    assert "a slice of 30 of 35 layers, without 20-24" in report["notes"][0]


def test_an_output_that_exists_is_refused_unless_forced(invoke, here):
    assert invoke("slice", "./whole", "--to", "e2b").exit_code == 0
    refused = invoke("slice", "./whole", "--to", "e2b")
    assert refused.exit_code == 1 and "whole-e2b" in refused.stderr and refused.stdout == ""
    assert invoke("slice", "./whole", "--to", "e1.96b", "-o", "whole-e2b", "--force").exit_code == 0
    assert config_of(here / "whole-e2b")["intermediate_size"][4] == 128


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--to NAME, or --ffn and --skip-layers"),
        (["--to", "e2b", "--ffn", "64"], 2, "leave out --ffn and --skip-layers"),
        (["--to", "e9b"], 2, "there are e2b, e1.96b"),
        (["--ffn", "64,wide"], 2, "'wide'"),
        (["--ffn", "64,64"], 2, "35 layers stay, and 2 widths are given"),
        (["--ffn", "48"], 2, "at 32 or 64, not at 48"),
        (["--skip-layers", "19"], 2, "layer 19 cannot be left out"),
        (["--skip-layers", "x"], 2, "such as 3,20-24"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(invoke, here, arguments, code, said):
    result = invoke("slice", "./whole", *arguments)
    assert result.exit_code == code and said in result.stderr, result.stderr
    assert [path.name for path in here.iterdir()] == ["whole"]


def test_other_models_have_no_slices(invoke, here, tiny):
    assert "only Gemma 3n" in invoke("slice", tiny, "--to", "e2b").stderr
    assert "only Gemma 3n" in invoke("run", tiny, "Hi", "--slice", "e2b").stderr
    assert invoke("slice", "./nowhere", "--to", "e2b").exit_code == 3


def test_what_is_read_from_the_disk_is_told(invoke, here):
    question = ("./whole", "Hi", "-n", "8", "--json", "--stats", "--temp", "0")
    resident, streamed = (invoke("run", *question, "--ple", ple) for ple in ("memory", "ssd"))
    answers = [json.loads(result.stdout) for result in (resident, streamed)]
    assert answers[0]["text"] == answers[1]["text"] and "streaming" not in answers[0]
    assert (
        answers[1]["streaming"]["bytes_read"] > 0
        and 0 <= answers[1]["streaming"]["recent_hit_rate"] <= 1
    )
    assert (
        "per-layer embeddings from the disk: " in streamed.stderr
        and "from the disk" not in resident.stderr
    )
