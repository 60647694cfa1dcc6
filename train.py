"""Train one continual-learning method on one task sequence: `python train.py --help` lists what there is."""

from inflora.cli import main

if __name__ == "__main__":
    main()
