"""The engine process of http_speed.py: `python -m benchmarks.micro.http_speed_engine FD`, started by ProcessClient."""

import sys

from benchmarks.micro.http_speed import run_null_engine

if __name__ == "__main__":
    run_null_engine(int(sys.argv[1]))
