# docker build -t moe_jax .                      for CPUs
# docker build -t moe_jax:cuda --build-arg EXTRA=cuda .
# docker build -t moe_jax:tpu --build-arg EXTRA=tpu .
FROM python:3.11-slim

# What a process writes beside its workdir (caches of libraries) lies in this home.
RUN useradd --create-home --uid 1000 moe
WORKDIR /app

# The libraries come before the code, so that a changed line of code does not install them anew.
COPY requirements.txt ./
COPY requirements ./requirements
COPY constraints/py311.txt ./constraints/
ARG EXTRA=core
RUN pip install --no-cache-dir -r requirements.txt -r "requirements/$EXTRA.txt" -c constraints/py311.txt

COPY moe_jax ./moe_jax
COPY configs ./configs
COPY launch ./launch
COPY LICENSE NOTICE ./
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1

USER moe
# Flags of moe_jax.main are its arguments. Kubernetes starts launch/kubernetes/start.sh instead.
ENTRYPOINT ["python", "-m", "moe_jax.main"]
