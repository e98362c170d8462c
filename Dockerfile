# CPU:   docker build -t rho1_jax .
# CUDA:  docker build -t rho1_jax:cuda --build-arg ACCELERATOR=cuda12 .
#        docker run --gpus all -v "$PWD/runs:/rho1_jax/runs" rho1_jax:cuda --config=configs/math.py
# The CUDA libraries come with JAX's wheels, so one base image serves both; the host needs the driver.
FROM python:3.12-slim

# bubblewrap and libseccomp confine the programs that models write (docs/sandbox.md).
RUN apt-get update \
 && apt-get install -y --no-install-recommends bubblewrap libseccomp2 \
 && rm -rf /var/lib/apt/lists/*

# cpu, cuda12, cuda13 or tpu: an extra of jax
ARG ACCELERATOR=cpu
WORKDIR /rho1_jax
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt "jax[${ACCELERATOR}]"
COPY . .

ENTRYPOINT ["python", "-m", "rho1_jax.main"]
CMD ["--config=configs/math.py"]
