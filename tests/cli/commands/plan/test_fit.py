"""fit, and what run and pull say of memory."""

import json

import pytest
from house import ROOT


def test_fit_tells_terms_verdict_and_table_of_a_name_without_weights_or_network(execute):
    result = execute(
        "fit", "qwen3-30b-a3b", "--machine", "m4-16gb", "--context", "4k", "--bits", "4"
    )
    assert result.returncode == 0, result.stderr
    for words in (
        "weights: experts",
        "keys and values: full layers",
        "activations",
        "together",
        "11.45 GB",
    ):
        assert words in result.stdout
    assert "streamed: " in result.stdout and "experts from the disk" in result.stdout
    assert "tokens a second, estimated (docs/fit.md)" in result.stderr


def test_fit_returns_4_and_ways_out_where_it_does_not_fit(invoke):
    result = invoke("fit", "gemma3-27b", "--machine", "m4-24gb", "--context", "32k", "--bits", "4")
    assert result.exit_code == 4
    assert "does not fit" in result.stdout and "--context 4096 makes it fit" in result.stdout
    assert (
        invoke(
            "fit", "gemma3-27b", "--machine", "m4-32gb", "--context", "4k", "--bits", "4"
        ).exit_code
        == 0
    )


def test_the_table_has_a_row_for_each_width_and_a_column_for_each_context(invoke):
    table = invoke("fit", "gemma3-12b", "--machine", "m4-16gb").stdout.split("\n\n")[1].splitlines()
    assert table[0].split() == ["bits", "4k", "8k", "16k", "32k", "64k", "128k"]
    assert [line.split()[0] for line in table[1:-1]] == ["16", "8", "6", "5", "4", "3", "2"]
    two_bits = table[-2]
    assert " no " in table[1] and " no " not in two_bits.rsplit(" no ", 1)[0] and "/s" in two_bits
    legend = {
        name: invoke("fit", name, "--machine", "m4-16gb").stderr
        for name in ("gemma3-12b", "qwen3-30b-a3b")
    }
    assert "; no: does not fit" in legend["gemma3-12b"] and "streamed: " not in legend["gemma3-12b"]
    assert "SSD: experts from the disk" in legend["qwen3-30b-a3b"]


def test_the_keys_of_fits_json_are_those_of_the_documentation(invoke):
    found = json.loads(invoke("fit", "qwen3-0.6b-4bit", "--machine", "m4-16gb", "--json").stdout)
    text = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")
    keys = {*found, *found["machine"], *found["table"][0]}
    assert {key for key in keys if f"`{key}`" not in text} == set()
    assert found["verdict"] == "resident" and found["bits"] == 4 and found["slots"] is None
    assert sum(found["terms"].values()) == found["total_bytes"] <= found["memory_bytes"]
    assert found["mlx_peak_bytes"] < found["process_peak_bytes"] < found["total_bytes"]
    assert len(found["table"]) == 4, "the contexts up to the longest, at the bits of the name"


def test_fewer_bits_of_keys_and_values_and_more_memory_change_the_plan(invoke):
    def fit(*arguments):
        return json.loads(
            invoke("fit", "qwen3-8b", "--bits", "4", "-c", "32k", "--json", *arguments).stdout
        )

    plain, packed = fit("--machine", "m4-16gb"), fit("--machine", "m4-16gb", "--kv-bits", "8")
    term = "keys and values: full layers"
    assert packed["terms"][term] == plain["terms"][term] * 17 // 32 and packed["kv_bits"] == 8
    assert (
        fit("--memory", "6GB")["verdict"] == "does not fit"
        and fit("--memory", "30GB")["verdict"] == "resident"
    )


def test_a_folder_is_planned_from_its_headers_as_it_runs(invoke, tiny):
    found = json.loads(invoke("fit", tiny, "--json").stdout)
    assert found["verdict"] == "resident" and found["machine"]["backend"] in (
        "cpu",
        "cuda",
        "metal",
    )
    assert found["bits"] == 16 and {cell["bits"] for cell in found["table"]} == {
        16,
        8,
        6,
        5,
        4,
        3,
        2,
    }
    ran = json.loads(invoke("run", tiny, "Hi", "-n", "2", "--json").stdout)["memory"]
    assert (ran["planned_bytes"], ran["planned_mlx_bytes"]) == (
        found["process_peak_bytes"],
        found["mlx_peak_bytes"],
    )
    assert invoke("fit", tiny, "--memory", "1MB").exit_code == 4
    assert (
        json.loads(invoke("fit", tiny, "--bits", "8", "--json").stdout)["mlx_peak_bytes"]
        != found["mlx_peak_bytes"]
    )


def test_what_cannot_be_planned_is_told(invoke, execute):
    assert invoke("fit", "qwen3-0.7b").exit_code == 3
    assert execute("fit", "org/model").returncode == 5, "a repository, and the Hub is out of reach"
    for wrong in (
        ["--machine", "m9"],
        ["--memory", "much"],
        ["-c", "9" * 5000],
        ["--kv-bits", "5"],
        ["--bits", "7"],
    ):
        assert invoke("fit", "qwen3-0.6b", *wrong).exit_code == 2
    assert invoke("fit", "qwen3-0.6b-4bit", "--bits", "8").exit_code == 2
    assert (
        "longer" in invoke("fit", "qwen3-0.6b", "-c", "64k").stderr
        or "1 … 40960" in invoke("fit", "qwen3-0.6b", "-c", "64k").stderr
    )


def test_run_refuses_with_the_arithmetic_instead_of_swapping(invoke, tiny):
    result = invoke("run", tiny, "Hi", "--memory", "1MB")
    assert result.exit_code == 4 and result.stdout == ""
    assert "weights: " in result.stderr or "together" in result.stderr
    assert invoke("run", tiny, "Hi", "-n", "3", "--memory", "1GB", "--kv-bits", "8").exit_code == 0


def test_a_download_that_would_not_fit_does_not_begin(execute):
    result = execute("run", "gemma3-27b-4bit", "Hi", "--memory", "8GB")
    assert result.returncode == 4 and "together" in result.stderr
    assert execute("run", "gemma3-27b-4bit", "Hi", "--memory", "80GB").returncode == 5, (
        "then the Hub is asked"
    )


def test_embeddings_on_the_disk_are_refused_where_there_are_none(invoke, tiny):
    for command in (("fit", "qwen3-0.6b"), ("fit", tiny), ("run", tiny, "Hi", "-n", "2")):
        result = invoke(*command, "--ple", "ssd")
        assert result.exit_code == 2 and result.stdout == ""
        assert (
            "has no table of per-layer embeddings" in result.stderr
            and "leave it at auto" in result.stderr
        )
        assert invoke(*command, "--ple", "memory").exit_code == 0
    assert json.loads(invoke("fit", "gemma3n-e4b", "--ple", "ssd", "--json").stdout)["ple"] == "ssd"


@pytest.mark.parametrize("machine", ["m4-24gb", "m4-16gb"])
def test_without_a_context_the_plan_is_a_cell_of_the_table(invoke, machine):
    report = json.loads(invoke("fit", "gemma3-27b", "--machine", machine, "--json").stdout)
    assert report["context"] == 4096  # it fits on 24 GB, though not with caches that grow
    [cell] = [
        cell
        for cell in report["table"]
        if (cell["bits"], cell["context"]) == (report["bits"], report["context"])
    ]
    assert all(cell[name] == report[name] for name in cell)


def test_a_plan_ends_with_the_verdict_and_has_one_screen(invoke):
    lines = invoke("fit", "gemma3-27b", "--machine", "m4-24gb").stdout.splitlines()
    assert len(lines) <= 22 and lines[-1].startswith("resident: ")
    assert max(map(len, lines[:-1])) <= 80
