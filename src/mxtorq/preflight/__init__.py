"""What a run will need, before it begins: memory, disk, time; and a refusal with what to change.

Lives here: the sizes that everything is computed from (`job`), what is in memory and on disk when
(`memory`, `disk`), a measured guess at the time (`probe`), and the comparison of all that with what
the machine has (`check`). The record and its table are `reports.needs`.

Not here: what the machine has (`mxtorq.machine`), and anything that a run does. A formula that is
wrong makes a wrong forecast, never wrong bits.
"""
