"""Batch jobs that turn raw text into documents, a tokenizer, token shards and packed samples."""
