"""What each step computes: a pure state machine over integers. Knows no device, no text and no clock.

`scheduler` plans and learns, `blocks` are the cache, `sharing` waits for prefixes, `policy` orders who waits, `cost`
predicts step times, `loop` runs plans on a device, `trace` records and replays. Two plans of the same calls are equal.
"""
