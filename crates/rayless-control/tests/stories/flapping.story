# The link flaps, two seconds down and one up, for a minute: never long enough to be death.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
cut a b
wait 2s
heal a b
wait 1s
cut a b
wait 2s
heal a b
wait 1s
cut a b
wait 2s
heal a b
wait 1s
cut a b
wait 2s
heal a b
wait 1s
expect not said "[node-dead]"
expect group g running
within 1s expect node b alive
