"""Benchmarks of single operations, of the server and of the Live tab: see README.md"""
