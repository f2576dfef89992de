"""Thousands of malformed inputs, each a function of its number: no traceback, no loss that is not counted.

python -m tests.fuzz --count 5000            all kinds in turn, in this process
python -m tests.fuzz --kinds tar,csv --seed 7 --count 300
python -m tests.fuzz --case tar:0:1234       one case again, with its traceback
"""
