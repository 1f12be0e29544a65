# It is the head that sleeps for ten seconds. On waking it blames itself, not the node, and adopts it again: the group on b
# and c, whose driver is on b, never notices.
node a: 8 CPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch h from b: 16 x {GPU:1}
within 2s expect group h running
pause a
wait 10s
resume a
wait 5s
expect not said "[node-dead]"
expect group h running
within 5s expect node b alive
within 5s expect node c alive
expect life b 1
