# A restarted daemon has forgotten the bundles on its node; the head tells it again, so that a head without state can learn them.
node a: 8 CPU
node b: 8 GPU
node c: 8 GPU
wait 1s
reserve pg from c: 2 x {GPU:4} STRICT_SPREAD
within 1s expect pg on c b
restart daemon b
within 1s expect life b 2
wait 1s
kill daemon a
lose head state
start a
within 3s expect node b alive
within 3s expect node c alive
expect placement groups: 1
expect free b: 4 GPU
expect free c: 4 GPU
remove pg
within 1s expect all free
