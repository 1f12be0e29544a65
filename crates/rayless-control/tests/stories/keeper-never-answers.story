# A node that never gets its keeper up: after twenty seconds the launch fails and names it.
node a: 8 GPU
node b: 8 GPU
wait 1s
mute b
launch g from a: 16 x {GPU:1}
wait 19s
expect g asking
within 2s expect g refused "Failed: node b did not start its keeper within 20 s"
within 1s expect all free
