"""Times of single operations, measured: python -m benchmarks.run --help"""
