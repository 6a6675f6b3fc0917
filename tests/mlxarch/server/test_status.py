"""Start page, metrics, and what happens to a path that there is not."""

from live_server import LiveServer


def test_the_start_page_answers_both_methods(server: LiveServer):
    page = server.get("/")
    assert page.status == 200
    assert "/v1/chat/completions" in page.body.decode()
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    head = server.request("HEAD", "/")
    assert (head.status, head.body) == (200, b"")


def test_metrics_count_what_was_answered(server: LiveServer):
    def total(name: str) -> float:
        text = server.get("/metrics").body.decode()
        found = [line for line in text.splitlines() if line.startswith(f"vllm:{name} ")]
        return float(found[0].split()[1]) if found else 0.0

    before = total("generation_tokens_total")
    server.chat()
    assert total("generation_tokens_total") == before + 6
    assert total("num_requests_running") == 0
    assert total("e2e_request_latency_seconds_count") > 0


def test_an_unknown_path_is_told_in_the_form_of_its_api(server: LiveServer):
    assert server.get("/v1/nothing").json["error"]["type"] == "invalid_request_error"
    assert server.get("/api/nothing").json == {
        "error": "there is no such path; GET / lists those that there are"
    }
    assert server.get("/v1/messages/x").json["error"]["type"] == "not_found_error"
    reply = server.get("/v1/chat/completions")
    assert reply.status == 405
    assert "POST" in reply.json["error"]["message"]


def test_texts_become_ids_and_back(server: LiveServer):
    tokens = server.post("/tokenize", {"content": "ab"}).json["tokens"]
    assert len(tokens) == 2
    assert server.post("/detokenize", {"tokens": tokens}).json["content"] == "ab"
    pieces = server.post("/tokenize", {"content": "ab", "with_pieces": True}).json["tokens"]
    assert [piece["piece"] for piece in pieces] == ["a", "b"]
    assert server.post("/detokenize", {"tokens": [10**6]}).status == 400
