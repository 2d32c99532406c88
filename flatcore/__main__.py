"""python -m flatcore"""

from flatcore.cli import main

if __name__ == "__main__":
    main(prog_name="flatcore")
