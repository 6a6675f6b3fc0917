"""Commands about models on this machine: pull, list, show, rm, verify, paths."""
