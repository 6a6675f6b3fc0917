"""One file per architecture, each readable next to its block diagram."""
