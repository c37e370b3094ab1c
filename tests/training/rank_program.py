"""Run as a program: see rank_jobs.py.

A module of its own, because a worker that reads images imports the program that started it: it
needs none of what the training does, whose imports take longer than its work.
"""

if __name__ == "__main__":
    from rank_jobs import main

    main()
