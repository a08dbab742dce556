"""What each step computes: a pure state machine over integers. Knows no device, no text and no clock.

`scheduler` plans and learns, `seats` and `policy` say who runs and who is next, `blocks` are the cache,
`sharing` waits for prefixes that others compute, `cost` predicts step times, `loop` runs plans on a device,
`trace` records and replays. The same calls always give the same plans.
"""
