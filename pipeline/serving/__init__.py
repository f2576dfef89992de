"""A server of images, with its page.

server.py            `smalti serve`: listens, and ends as it was asked to
app.py               the addresses: OpenAI's images API, health, metrics, and the page in page/
asked.py             what a client may ask for, with its bounds; uploads.py the images that it sends
answers.py           what it gets: JSON, events of a stream, errors
engine.py            requests that join at the next code and leave when they are done (sampling/row_batch.py)
finish.py            from codes to the file that is sent
nearest.py           the training images most like an image
guard.py             what every request passes first: token, origin, size, time
counts.py            metrics for Prometheus
"""
