"""``python -m fedllm`` is the command line."""

from fedllm.cli import main

if __name__ == "__main__":
    main()
