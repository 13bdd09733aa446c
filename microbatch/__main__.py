"""`python -m microbatch` is the command line."""

from microbatch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
