# Node b is stopped for two seconds and goes on: suspect meanwhile, then alive; its group never notices.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
pause b
wait 2s
expect node b suspect
resume b
within 1s expect node b alive
wait 5s
expect group g running
expect life b 1
