# Only what the head and the driver send is lost: b hears nothing, drops its part, and the group ends with one cause.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
cut a -> b
within 4s expect keepers b 0
within 4s expect group g failed
within 1s expect keepers a 0
heal a b
within 5s expect node b alive
within 5s expect all free
