"""Model store: installed models, and how a name becomes a folder that can be loaded."""
