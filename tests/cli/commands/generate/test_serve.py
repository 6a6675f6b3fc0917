"""``mlxarch serve``: what is refused before anything is served."""

import socket


def test_a_bind_beyond_this_machine_needs_a_key(invoke, tiny):
    done = invoke("serve", tiny, "--host", "0.0.0.0")
    assert done.exit_code == 2
    assert "--api-key" in done.stderr


def test_a_port_that_is_taken_is_told(invoke, tiny):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = invoke("serve", tiny, "--port", port)
    assert done.exit_code == 1
    assert port in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_exist_is_told(invoke):
    assert invoke("serve", "./no-such-folder").exit_code == 3
