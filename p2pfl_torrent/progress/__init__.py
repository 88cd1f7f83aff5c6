"""Terminal views over snapshots and events; they never reach into the machine behind them.

sentences  events in words, numbers as people read them
state      events and snapshots of several peers, folded together
views      rich renderables over that state
display    redraws them on a terminal, prints lines elsewhere
"""
