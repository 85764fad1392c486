"""`jepa-fast bench step`: whole training steps of several codes on the same weights, batches and masks.

Every provider is a training loop that pulls batches, in a process of its own, and the bench is its data loader: it hands
out batches, stops the clock when the next one is asked for, and keeps the loop waiting while others have their turn.
So the official code runs its own `main`, untouched: its modules, optimizer, schedules, loggers and stops.

work.py: what all providers get. worker.py: one provider's process. providers.py: who they are; official_*.py: the authors'
code, imported from a checkout; style_*.py and plain_loop.py: the same steps written again in plain PyTorch. profile.py: a
step taken apart. run.py: the rounds. page.py: table, CSV, JSON, picture.
"""
