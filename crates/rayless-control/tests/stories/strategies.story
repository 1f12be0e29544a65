# SPREAD, STRICT_SPREAD and STRICT_PACK, and what each says when it cannot be.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch spread from b: 6 x {GPU:1} SPREAD
within 1s expect spread placed b:0-1 a:2-3 c:4-5
stop spread
within 1s expect all free
launch each from a: 3 x {GPU:2} STRICT_SPREAD
within 2s expect each placed a:0 b:1 c:2
launch four from a: 4 x {GPU:1} STRICT_SPREAD wait 5s
within 1s expect four waiting "needs 4 bundles of 1 GPU on a node each (STRICT_SPREAD), 3 of the 3 nodes could take one"
launch one from c: 6 x {GPU:1} STRICT_PACK
within 1s expect one placed c:0-5
launch nine from a: 9 x {GPU:1} STRICT_PACK wait 5s
within 1s expect nine waiting "needs 9 bundles of 1 GPU on one node (STRICT_PACK), no node has that much"
launch seven from c: 7 x {GPU:1} STRICT_PACK wait 5s
within 1s expect seven waiting "needs 7 bundles of 1 GPU: 12 GPUs are free, but not in that shape"
wait 5s
expect nine refused
stop one
stop each
within 1s expect all free
