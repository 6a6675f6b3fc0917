"""Prefix cache: KV caches of earlier prompts and answers, which later prompts that begin alike reuse.

tree    the cache in memory, over token ids
files   the cache on the disk, one file for each node
use     when a prompt is looked up, and when caches are stored
"""
