# When the large launch in front gives up, those behind it go on.
node a: 8 GPU
wait 1s
launch hold from a: 4 x {GPU:1}
within 1s expect hold placed
launch large from a: 8 x {GPU:1} wait 20s
launch small from a: 2 x {GPU:1}
within 1s expect small waiting
wait 15s
expect small waiting
within 6s expect large refused "waited 20 s"
within 1s expect small placed a:0-1
