"""The list of models."""

from live_server import LiveServer


def test_the_list_suits_the_clients_of_both_apis(server: LiveServer):
    page = server.get("/v1/models").json
    assert page["object"] == "list"
    assert page["has_more"] is False
    [model] = page["data"]
    assert page["first_id"] == page["last_id"] == model["id"] == "tiny"
    assert model["object"] == model["type"] == "model"
    assert isinstance(model["created"], int)
    assert model["created_at"].endswith("Z")
    assert model["context_length"] == 1280
    assert server.get("/models").json == page


def test_one_model_is_shown_by_its_name(server: LiveServer):
    assert server.get("/v1/models/tiny").json["id"] == "tiny"
    for name in ("other", "org/name", "..%2f..%2fetc"):
        reply = server.get(f"/v1/models/{name}")
        assert reply.status == 404
        assert reply.json["error"]["code"] == "model_not_found"
