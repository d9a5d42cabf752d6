"""Speculative decoding: drafters propose, the target verifies; the answer stays the target's own."""
