# Thirty percent loss and two hundred milliseconds of delay with jitter: slow, but nobody dies, not even for a minute.
node a: 8 GPU
node b: 8 GPU
delay a b 200ms
jitter a b 100ms
loss a b 30%
within 20s expect node b alive
launch g from a: 16 x {GPU:1}
within 20s expect group g running
for 60s expect not said "[node-dead]"
expect g placed
expect group g running
stop g
within 20s expect all free
