# The wire between the nodes is cut: dead within three seconds and a half, one cause for driver and head, everything torn
# down. When it heals, the node is fenced, comes back as a new life and is used again.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
cut a b
within 3.6s expect node b dead
within 100ms expect g failed "node b has been silent for 3.0 s"
within 1s expect group g failed "node b has been silent for 3.0 s"
within 1s expect keepers a 0
within 2s expect keepers b 0
launch h from a: 16 x {GPU:1}
within 1s expect h waiting "needs 16 GPUs, the only node has 8; node b is dead"
heal a b
within 3s expect said "[node-fenced] node b was declared dead (no heartbeat for 3.0 s) and spoke again"
within 1s expect node b alive
expect life b 2
within 1s expect h placed a:0-7 b:8-15
