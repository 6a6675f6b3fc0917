"""Repacking: experts and embedding rows laid out so that one read fetches one of them."""
