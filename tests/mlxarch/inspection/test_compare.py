"""Where configs come from, what is written of them, and the drawing."""

import json
import re
import shutil
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest
from fake_hub import FakeHub, Refused, Repo, Worker, environment
from house import ROOT

from mlxarch.errors import ConfigError, MlxArchError, ModelNotFound, UnsupportedArchitecture
from mlxarch.hub import catalog
from mlxarch.inspection import compare
from mlxarch.inspection.compare import InspectedModel, inspect_model
from mlxarch.inspection.diagram import Box, draw_svg
from mlxarch.loading.model_types import BY_CLASS, MODELS

SVG = "{http://www.w3.org/2000/svg}"


WITHOUT_ENTRY = {  # in the catalog
    "bailing_hybrid",
    "cohere2",
    "cohere2_moe",
    "deepseek_v32",
    "deepseek_v4",
    "exaone4",
    "falcon_h1",
    "glm5_next",
    "glm_moe_dsa",
    "hunyuan_v1",
    "laguna",
    "mimo_v2_flash",
    "muse_glimmer",
    "qwen4_exp",
    "step3p7",
}


@pytest.fixture(scope="module")
def everything() -> list[InspectedModel]:
    return [inspect_model(name) for name in catalog.entries()]


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_name_a_file_and_a_folder_say_the_same(tmp_path):
    entry = catalog.entries()["olmo2-7b"]
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(entry.config_path, folder / "config.json")
    found = [
        inspect_model("OLMo-2:7b"),
        inspect_model(folder),
        inspect_model(folder / "config.json"),
        inspect_model(entry.config_path),
    ]
    assert all(model.structure == found[0].structure for model in found)
    assert [model.title for model in found] == [
        "OLMo 2 7B Instruct",
        "a folder",
        "config.json",
        "olmo2-7b.json",
    ]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match="olmo2-7b"):
        inspect_model("olmo2-9b")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UnsupportedArchitecture, match="unheard-of"):
        inspect_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="hidden_size"):
        inspect_model(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(MlxArchError, match=r"config\.json"):
        inspect_model(tmp_path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, Worker]]:
    server = FakeHub()
    worker = Worker(environment(tmp_path_factory.mktemp("home"), server.url))
    yield server, worker
    worker.close()
    server.close()


def test_of_a_repository_nothing_but_the_config_is_fetched(hub):
    server, worker = hub
    config = catalog.entries()["gpt-oss-20b"].config_path.read_bytes()
    server.repos["org/model"] = Repo(
        {"config.json": config, "model.safetensors": b"x" * 5000, "tokenizer.json": b"{}"}
    )
    look = (
        "from mlxarch.inspection.compare import inspect_model; m = inspect_model(name); "
        "return m.title, m.structure.parameters"
    )
    assert worker(look, name="org/model") == ["model", 20_914_757_184]
    assert server.requests and all("config.json" in path for _, path, _ in server.requests)
    with pytest.raises(Refused, match="org/none"):
        worker(look, name="org/none")


# Text ----------------------------------------------------------------------------------------------------------------


def test_the_page_of_the_docs_is_what_the_models_are(everything):
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page == compare.architectures_page(everything).rstrip("\n") + "\n", (
        "mlxarch compare --markdown > docs/architectures.md"
    )


def test_the_page_has_every_architecture_that_runs(everything):
    # DeepSeek-V2 is older than the models that the catalog holds; of some newer ones no commit is known
    assert {model.structure.file for model in everything} == {
        *MODELS.values(),
        *BY_CLASS.values(),
    } - {"deepseek_v2", *WITHOUT_ENTRY}


def test_active_parameters_that_are_far_from_the_published_ones_are_explained(everything):
    for model in everything:
        stated = model.entry.published_active if model.entry else None
        far = stated is not None and abs(model.structure.active_parameters / stated - 1) > 0.05
        notes = [note for note in compare.published_differences(model) if "active" in note]
        assert bool(notes) is far, model.name
        if notes and stated:
            s = model.structure
            table = s.vocab_size * s.hidden_size
            counted = (
                s.active_parameters - table if "leaves" in notes[0] else s.active_parameters + table
            )
            assert abs(counted / stated - 1) < 0.03, (
                "what the note says accounts for the difference"
            )


def test_the_table_of_blocks_tells_architectures_apart(everything):
    rows = {row[0]: row for row in compare.block_table(everything)}
    columns = rows[""]

    def used(file: str) -> set[str]:
        return {name for name, mark in zip(columns, rows[file], strict=True) if mark == "●"}

    assert used("deepseek_v3") >= {"LatentAttention", "GroupLimitedSigmoid", "MoE"}
    assert "Attention" not in used("deepseek_v3")
    assert used("gemma3") - used("llama3") >= {"Sliding", "ZeroCenteredRMSNorm"}
    assert "NoRoPE" in used("smollm3") & used("llama4") and "NoRoPE" not in used("llama3")
    assert "LayerNorm" in used("gpt2") and "RMSNorm" not in used("gpt2")


def test_a_table_has_a_column_for_each_model():
    models = [inspect_model(name) for name in ("llama3-8b", "deepseek-v3")]
    table = compare.comparison_table(models)
    assert table[0] == ["", "Llama 3 8B Instruct", "DeepSeek-V3"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["parameters"] == ["8.03B", "671B"] and rows["active"] == ["7.50B", "36.6B"]
    assert rows["KV heads"] == ["8", "latent"] and rows["KV at 32k"] == ["1.1 GB*", "2.3 GB"]
    assert rows["4 bits"] == ["4.5 GB", "378 GB"] and rows["layers"] == ["32", "61"]


def test_json_holds_numbers():
    found = json.loads(json.dumps(compare.to_json(inspect_model("qwen3-30b-a3b"))))
    assert (
        found["parameters"] == 30_532_122_624
        and found["weight_bytes"]["16"] == 2 * found["parameters"]
    )
    assert found["blocks"][0]["branches"][0] == [["input_layernorm"], ["self_attn"]]
    assert found["blocks"][0]["feed_forward"]["experts"] == 128
    assert found["blocks"][0]["layers"] == list(range(48))


# The drawing ---------------------------------------------------------------------------------------------------------


def boxes(svg: str) -> list[list[tuple[float, float, float, float, str]]]:
    """Boxes of each column: left, top, width, height, and the first line of text."""
    found = []
    for column in ElementTree.fromstring(svg).findall(f"{SVG}g"):
        inside, children = [], list(column)
        for shape, text in zip(children, children[1:], strict=False):
            if (
                shape.tag == f"{SVG}rect"
                and text.tag == f"{SVG}text"
                and text.get("font-weight") == "600"
            ):
                inside.append(
                    (
                        *(float(shape.get(k) or 0) for k in ("x", "y", "width", "height")),
                        text.text or "",
                    )
                )
        found.append(inside)
    return found


def test_boxes_stand_in_the_order_of_the_layer():
    before, behind = boxes(compare.to_svg([inspect_model("llama3-8b"), inspect_model("olmo2-7b")]))

    def upwards(column: list[tuple[float, float, float, float, str]]) -> list[str]:
        return [title for *_, title in sorted(column, key=lambda box: -box[1]) if "×" not in title]

    attention = "Grouped-query attention"
    assert upwards(before) == [
        *("Token embedding", "RMSNorm", attention, "RMSNorm", "SwiGLU", "RMSNorm", "Output head")
    ]
    assert upwards(behind) == [
        *(
            "Token embedding",
            "Multi-head attention",
            "RMSNorm",
            "SwiGLU",
            "RMSNorm",
            "RMSNorm",
            "Output head",
        )
    ]


def test_no_box_covers_another_or_leaves_the_picture(everything):
    svg = compare.to_svg(everything)
    width, height = (
        float(ElementTree.fromstring(svg).get(side) or 0) for side in ("width", "height")
    )
    offsets = [
        tuple(map(float, m)) for m in re.findall(r'transform="translate\((\S+) (\S+)\)"', svg)
    ]
    drawn = boxes(svg)
    assert len(drawn) == len(offsets) == len(everything)
    for column, (right, down), model in zip(drawn, offsets, everything, strict=True):
        column = [box for box in column if "×" not in box[4]]  # the ground of the layers lies below
        branches = model.structure.blocks[0].branches  # at least a norm and what follows it
        assert len(column) > 3 + len(branches)
        for index, (x, y, w, h, _) in enumerate(column):
            assert (
                x + right >= 0
                and x + w + right <= width
                and y + down >= 0
                and y + h + down <= height
            )
            for a, b, c, d, _ in column[:index]:
                assert x + w <= a or a + c <= x or y + h <= b or b + d <= y


def test_no_line_of_text_is_wider_than_its_box(everything):
    for column in ElementTree.fromstring(compare.to_svg(everything)).findall(f"{SVG}g"):
        wide = 0.0
        for shape in column:
            if shape.tag == f"{SVG}rect":
                wide = float(shape.get("width") or 0)
            elif shape.tag == f"{SVG}text" and shape.get("text-anchor") == "middle" and wide < 500:
                size, bold = float(shape.get("font-size") or 0), shape.get("font-weight") != "400"
                if size <= 12.5:  # titles stand above the boxes
                    assert len(shape.text or "") * size * (0.58 if bold else 0.5) < wide, shape.text


def test_experts_branches_and_other_layers_are_drawn():
    svg = compare.to_svg(
        [inspect_model(name) for name in ("deepseek-v3", "grok2.5", "gemma3n-e4b")]
    )
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {
        "61 ×",
        "8 of 256 experts",
        "layers 1 to 3: SwiGLU, 18,432 wide",
        "laurel",
        "2 of 8 experts",
    } <= set(texts)
    grok = boxes(svg)[1]
    (dense,), (sparse,) = (
        [b for b in grok if b[4] == title] for title in ("GeGLU", "Mixture of experts")
    )
    assert (
        dense[0] + dense[2] < sparse[0]
        and dense[1] < sparse[1] + sparse[3]
        and sparse[1] < dense[1] + dense[3]
    )


def test_a_title_cannot_break_the_drawing():
    title = '<script>alert(1)</script> & "more"'
    svg = draw_svg([(title, inspect_model("qwen3-0.6b").structure)])
    assert "<script>" not in svg
    assert title in [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_line_that_is_wider_than_its_box_is_broken() -> None:
    box = Box(["Attention", "window 128 and entries of 4, top 512, " * 3], "attention")
    assert len(box.rows) > 2 and " ".join(box.rows[1:]) == box.lines[1].strip()
    assert len(Box(["Attention", "full"], "attention").rows) == 2
