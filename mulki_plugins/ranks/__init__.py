"""One run on several ranks: processes that train one model together, each on its share of every batch (docs/distributed.md).

Stages, adapters and other plugins may import `mulki_plugins.ranks.collectives`: on one process its functions do nothing.
"""
