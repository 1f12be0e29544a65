# A driver that goes away leaks nothing: while it waits, while its keepers start, and right after it was told.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch waits from b: 17 x {GPU:1}
within 1s expect waits waiting
cancel waits
launch starts from b: 16 x {GPU:1}
wait 10ms
cancel starts
wait 2s
expect all free
launch placed from b: 16 x {GPU:1}
within 1s expect placed placed
kill driver placed
within 1s expect group placed failed "the driver on node b died"
within 1s expect all free
