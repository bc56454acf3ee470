"""What a run will need, before it begins: memory, disk, time; and a refusal with what to change.

Lives here: what the machine has (`machine`), the sizes that everything is computed from (`job`),
what is in memory and on disk when (`memory`, `disk`), a measured guess at the time (`probe`), and
the comparison of all that (`check`). The record and its table are `reports.needs`.

Not here: anything that a run does. A formula that is wrong makes a wrong forecast, never wrong
bits.
"""
