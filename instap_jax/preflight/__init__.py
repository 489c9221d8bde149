"""`instap preflight`: what must be right before a pod is held for days, tried in minutes.

rows      a check's outcome; the table; what all hosts of a pod found, put together
host      processes, devices, storage, disk, memory, compile cache
inputs    data sets, tokenizer, teacher, initial parameters
trial     real batches and real steps
run       all of it, in order
"""
