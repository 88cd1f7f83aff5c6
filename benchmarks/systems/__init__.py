"""The systems that `compare` lets do the same work, and how they are led.

A system is so many processes of one module in here. `runs` leads them, `catalogue` lists them,
`environments` installs what some of them need, and `child` is what all their processes share.
"""
