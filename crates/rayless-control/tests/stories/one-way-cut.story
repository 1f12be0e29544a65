# Only what b sends is lost. That is death, too: b still hears the head, but nobody hears b.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
cut b -> a
within 3.6s expect node b dead
within 1s expect g failed "node b has been silent"
within 2s expect keepers b 0
heal a b
within 4s expect node b alive
within 10s expect all free
