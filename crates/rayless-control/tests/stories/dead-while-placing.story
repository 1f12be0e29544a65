# Node b loses power while its keeper starts: the launch fails with that cause, and nothing is left on a.
node a: 8 GPU
node b: 8 GPU
wait 1s
mute b
launch g from a: 16 x {GPU:1}
within 1s expect keepers a 1
power off b
within 4s expect g refused "Failed: node b is dead: no heartbeat for 3.0 s"
within 1s expect keepers a 0
unmute b
power on b
within 2s expect node b alive
within 1s expect all free
