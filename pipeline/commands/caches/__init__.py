"""``alignkd cache append``, ``merge`` and ``subset``: a cache grows, joins others, gives a part."""
