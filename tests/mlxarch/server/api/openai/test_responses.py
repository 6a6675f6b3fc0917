"""Responses: items, events and stored turns."""

import pytest
from live_server import LiveServer


def respond(server: LiveServer, given: str | list = "hi", **fields):
    body = {"input": given, "max_output_tokens": 5, "temperature": 0}
    return server.post("/v1/responses", body | fields)


def test_a_response_has_the_shape_of_the_api(server: LiveServer):
    response = respond(server).json
    assert response["object"] == "response"
    assert response["id"].startswith("resp_")
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    [item] = response["output"]
    assert item["type"] == "message"
    assert item["status"] == "incomplete"
    [part] = item["content"]
    assert part["type"] == "output_text"
    assert len(part["text"]) == 5
    usage = response["usage"]
    assert usage["input_tokens"] == 4
    assert usage["output_tokens"] == 5
    assert usage["input_tokens_details"]["cached_tokens"] >= 0
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_events_are_numbered_and_build_the_response(server: LiveServer):
    whole = respond(server).json["output"][0]["content"][0]["text"]
    reply = respond(server, stream=True)
    events = reply.events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    names = [line[7:] for line in reply.body.decode().split("\n") if line.startswith("event: ")]
    assert names == kinds
    deltas = [kind for kind in kinds if kind.endswith(".delta")]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    texts = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    assert "".join(texts) == whole
    assert events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == whole
    assert len({event["response"]["id"] for event in (events[0], events[-1])}) == 1


def test_a_response_is_stored_and_continued(server: LiveServer):
    first = respond(server, "ab", instructions="x").json
    assert server.get(f"/v1/responses/{first['id']}").json == first
    items = server.get(f"/v1/responses/{first['id']}/input_items").json["data"]
    assert items[0]["content"][0]["text"] == "ab"
    second = respond(server, "cd", previous_response_id=first["id"]).json
    by_hand = respond(
        server,
        [
            {"role": "user", "content": "ab"},
            first["output"][0],
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "cd"}]},
        ],
    ).json
    assert second["output"][0]["content"] == by_hand["output"][0]["content"]
    assert second["usage"]["input_tokens"] == by_hand["usage"]["input_tokens"]
    deleted = server.request("DELETE", f"/v1/responses/{first['id']}")
    assert deleted.json["deleted"] is True
    assert server.get(f"/v1/responses/{first['id']}").status == 404
    error = respond(server, "cd", previous_response_id=first["id"]).json["error"]
    assert error["code"] == "previous_response_not_found"


def test_a_response_that_is_not_to_be_stored_is_not(server: LiveServer):
    response = respond(server, store=False).json
    assert server.get(f"/v1/responses/{response['id']}").status == 404


def test_the_oldest_turns_are_left_out_where_that_is_asked_for(server: LiveServer):
    items = []
    for letter in "abcde":
        items += [{"role": "user", "content": letter * 280}, {"role": "assistant", "content": "y"}]
    items.append({"role": "user", "content": "last"})
    assert respond(server, items).json["error"]["code"] == "context_length_exceeded"
    response = respond(server, items, truncation="auto").json
    assert "oldest" in response["warnings"][0]
    assert 900 < response["usage"]["input_tokens"] < 1280
    alone = respond(server, "z" * 1500, truncation="auto").json
    assert alone["error"]["code"] == "context_length_exceeded"


def test_items_of_all_kinds_are_read(server: LiveServer):
    items = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "YQ=="},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "5"},
    ]
    assert respond(server, items).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"frobnicate": 1}, "frobnicate"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(server: LiveServer, fields, param):
    reply = (
        respond(server, **({"given": "a"} | {k: v for k, v in fields.items() if k != "input"}))
        if "input" not in fields
        else server.post("/v1/responses", fields)
    )
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


def test_tools_results_and_inclusions_are_checked(server: LiveServer):
    nameless = respond(server, tools=[{"type": "function"}])
    assert (nameless.status, nameless.json["error"]["param"]) == (400, "tools[0].name")
    lost = respond(server, [{"type": "function_call_output", "output": "x"}])
    assert (lost.status, lost.json["error"]["param"]) == (400, "input[0].call_id")
    unknown = respond(server, include=["x"])
    assert (unknown.status, unknown.json["error"]["param"]) == (400, "include")
    assert respond(server, include=["file_search_call.results"]).status == 200
    assert respond(server, [{"type": ["x"]}]).status == 400


def test_input_items_have_ids_and_come_in_pages(server: LiveServer):
    given = [{"role": "user", "content": text} for text in "abc"]
    path = f"/v1/responses/{respond(server, given).json['id']}/input_items"
    whole = server.get(path).json
    ids = [item["id"] for item in whole["data"]]
    assert len(set(ids)) == 3
    assert [item["content"] for item in whole["data"]] == ["c", "b", "a"]
    assert (whole["first_id"], whole["last_id"]) == (ids[0], ids[-1])
    page = server.get(f"{path}?order=asc&limit=1&after={ids[1]}").json
    assert [item["id"] for item in page["data"]] == [ids[0]]
    assert not page["has_more"]
    assert server.get(f"{path}?limit=1").json["has_more"]
    for wrong in ("order=x", "limit=0", "limit=x", "after=x"):
        assert server.get(f"{path}?{wrong}").status == 400
    referred = respond(server, [{"type": "item_reference", "id": ids[0]}])
    assert referred.json["usage"]["input_tokens"] == 3
