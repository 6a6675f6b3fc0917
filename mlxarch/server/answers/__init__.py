"""From a validated request to typed events of its answers, on the event loop's side of the engine."""
