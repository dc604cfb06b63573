"""Each thing that can be wrong with a spec, with the exact place and words that a user is told."""
# ruff: noqa: E501 - a row is what was changed in the good spec, and all that is said about it
# fmt: off

from pathlib import Path

import pytest

from topwork.spec.applications import LEAST_SIDE
from topwork.spec.loading.loader import read_text
from topwork.spec.loading.problems import WrongSpec

GOOD = Path(__file__).with_name("test_spec_good.yaml").read_text(encoding="utf-8")
APPLICATIONS = ", ".join(LEAST_SIDE)

WRONG: list[tuple[dict[str, str], list[str]]] = [
    ({"    epochs: 20": "    epoch: 20"}, ["26:5: spec.transfer.epoch: no such key. Did you mean epochs? Known: train, epochs, batchSize, optimizer, loss, classWeights, earlyStopping, featureCache.", ]),
    ({"    batchSize: 64": "    batch_size: 64"}, ["27:5: spec.transfer.batch_size: no such key. Did you mean batchSize? Known: train, epochs, batchSize, optimizer, loss, classWeights, earlyStopping, featureCache.", ]),
    ({"  seed: 42": "  sed: 42"}, ["51:3: spec.sed: no such key. Did you mean seed? Known: storage, dataset, model, augmentation, transfer, fineTune, evaluate, publish, compute, metrics, seed.", ]),
    ({"kind: TransferJob\n": ""}, ["2:1: kind: missing. Kind of object. Allowed: TransferJob.", ]),
    ({"  name: cats-vs-dogs\n": ""}, ["4:1: metadata.name: missing. DNS-1123 label of at most 40 characters; names the job, its dataset and model. Allowed: a DNS-1123 label: a-z, 0-9 and dash, first and last no dash, at most 40 characters.", ]),
    ({"    imageSize: [150, 150]\n": ""}, ["9:3: spec.dataset.imageSize: missing. Height and width in pixels that every image is resized to. Allowed: a list of 2, each a whole number from 16 to 2048.", ]),
    ({"    epochs: 20": "    epochs: 20\n    epochs: 30"}, ["27:5: spec.transfer.epochs: stands twice; it is in line 26 already. Keep one.", ]),
    ({"  seed: 42": "  1: 42"}, ["51:3: spec.1: a key is text, and here stands 1. Put quotes around it.", ]),
    ({"  seed: 42": "  seed: 42\n  <<: {}"}, ["52:3: spec.<<: the merge key << is no part of YAML 1.2. Write the keys out.", ]),
    ({"  seed: 42": "  seed: 42\n  ? [a]\n  : 1"}, ["52:5: spec.?: a key is text, and here stands a list or mapping. Put quotes around it.", ]),
    ({"    epochs: 20": '    epochs: "20"'}, ['26:13: spec.transfer.epochs: "20" is not allowed. Leave out the quotes. Allowed: a whole number from 1 to 10000.', ]),
    ({"    epochs: 20": "    epochs: twenty"}, ['26:13: spec.transfer.epochs: "twenty" is not allowed. Allowed: a whole number from 1 to 10000.', ]),
    ({"    epochs: 20": "    epochs: 20.0"}, ["26:13: spec.transfer.epochs: 20.0 is not allowed. Allowed: a whole number from 1 to 10000.", ]),
    ({"    epochs: 20": "    epochs: true"}, ["26:13: spec.transfer.epochs: true is not allowed. Allowed: a whole number from 1 to 10000.", ]),
    ({"    epochs: 20": "    epochs:"}, ["26:5: spec.transfer.epochs: null is not allowed. Allowed: a whole number from 1 to 10000. Or leave the key out.", ]),
    ({"    epochs: 20": "    epochs: [20]"}, ["26:13: spec.transfer.epochs: a list of 1 is not allowed. Allowed: a whole number from 1 to 10000.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: 150"}, ["16:16: spec.dataset.imageSize: 150 is not allowed. Allowed: a list of 2, each a whole number from 16 to 2048.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150]"}, ["16:16: spec.dataset.imageSize: a list of 1 is not allowed. Allowed: a list of 2, each a whole number from 16 to 2048.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 150, 3]"}, ["16:16: spec.dataset.imageSize: a list of 3 is not allowed. Allowed: a list of 2, each a whole number from 16 to 2048.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, wide]"}, ['16:22: spec.dataset.imageSize[1]: "wide" is not allowed. Allowed: a whole number from 16 to 2048.', ]),
    ({"    head: {pooling: avg, hidden: [], dropout: 0.2}": "    head: avg"}, ['22:11: spec.model.head: "avg" is not allowed. Allowed: a mapping with pooling, hidden, dropout.', ]),
    ({"  seed: 42": "  seed: 2001-01-01"}, ['51:9: spec.seed: "2001-01-01" is not allowed. Allowed: a whole number from 0 to 2147483647.', ]),
    ({"name: adam, learningRate: 0.001}": "name: adam, learningRate: '0.001'}"}, ['28:43: spec.transfer.optimizer.learningRate: "0.001" is not allowed. Leave out the quotes. Allowed: a number above 0 and at most 10.', ]),
    ({"name: adam, learningRate: 0.001}": "name: sgd, momentum: 0.9, nesterov: yes, learningRate: 0.001}"}, ['28:53: spec.transfer.optimizer.nesterov: "yes" is not allowed. Did you mean true? Allowed: true or false.', ]),
    ({"name: adam, learningRate: 0.001}": "name: adam, learningRate: .nan}"}, ["28:43: spec.transfer.optimizer.learningRate: nan is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({"name: adam, learningRate: 0.001}": "name: adam, learningRate: 1e999}"}, ["28:43: spec.transfer.optimizer.learningRate: inf is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({"    loss: auto": "    loss: 3"}, ["29:11: spec.transfer.loss: 3 is not allowed. Allowed: auto, binaryCrossentropy, categoricalCrossentropy, sparseCategoricalCrossentropy, focal or a mapping with name, labelSmoothing, gamma.", ]),
    ({"    loss: auto": "    loss: focl"}, ['29:11: spec.transfer.loss: "focl" is not allowed. Did you mean focal? Allowed: auto, binaryCrossentropy, categoricalCrossentropy, sparseCategoricalCrossentropy, focal or a mapping with name, labelSmoothing, gamma.', ]),
    ({"    loss: auto": "    loss: {name: focal, gama: 3}"}, ["29:25: spec.transfer.loss.gama: no such key. Did you mean gamma? Known: name, labelSmoothing, gamma.", ]),
    ({"    unfreeze: all": "    unfreeze: everything"}, ['34:15: spec.fineTune.unfreeze: "everything" is not allowed. Allowed: all, {layers: n}, {from: name} or {steps: […]}.', ]),
    ({"    unfreeze: all": "    unfreeze: 20"}, ["34:15: spec.fineTune.unfreeze: 20 is not allowed. Allowed: all, {layers: n}, {from: name} or {steps: [\u2026]}.", ]),
    ({"    unfreeze: all": "    unfreeze: {layer: 20}"}, ['34:15: spec.fineTune.unfreeze: a mapping with "layer" is not allowed. Allowed: all, {layers: n}, {from: name} or {steps: […]}.', ]),
    ({"    unfreeze: all": "    unfreeze: {layers: few}"}, ['34:24: spec.fineTune.unfreeze.layers: "few" is not allowed. Allowed: a whole number from 1 to 10000.', ]),
    ({"    unfreeze: all": "    unfreeze: {from: 3}"}, ["34:22: spec.fineTune.unfreeze.from: 3 is not allowed. Allowed: the name of a layer of the base.", ]),
    ({"    cpu: 8": "    cpu: lots"}, ['45:10: spec.compute.cpu: "lots" is not allowed. Allowed: cores as a number above 0, at most 1024, or a Kubernetes quantity such as 500m.', ]),
    ({"    cpu: 8": "    cpu: 0"}, ["45:10: spec.compute.cpu: 0 is not allowed. Allowed: cores as a number above 0, at most 1024, or a Kubernetes quantity such as 500m.", ]),
    ({"  labels: {team: vision}": "  labels: {team: 7}"}, ["6:18: metadata.labels.team: 7 is not allowed. Allowed: a Kubernetes label value: at most 63 letters, digits, dash, underscore and dot, in quotes if it is a number.", ]),
    ({"  labels: {team: vision}": "  labels: {-team: vision}"}, ['6:12: metadata.labels.-team: "-team" is not allowed here. Allowed: a Kubernetes label key: [prefix/]name, the name of at most 63 letters, digits, dash, underscore and dot.', ]),
    ({"    gpus: 2": "    gpus: 99"}, ["44:11: spec.compute.gpus: 99 is not allowed. Allowed: a whole number from 0 to 16.", ]),
    ({"    gpus: 2": "    gpus: -1"}, ["44:11: spec.compute.gpus: -1 is not allowed. Allowed: a whole number from 0 to 16.", ]),
    ({"  seed: 42": "  seed: 99999999999999999999"}, ["51:9: spec.seed: 99999999999999999999 is not allowed. Allowed: a whole number from 0 to 2147483647.", ]),
    ({"dropout: 0.2}": "dropout: 1.0}"}, ["22:47: spec.model.head.dropout: 1.0 is not allowed. Allowed: a number from 0 to below 1.", ]),
    ({"learningRate: 0.001}": "learningRate: 0}"}, ["28:43: spec.transfer.optimizer.learningRate: 0 is not allowed. Allowed: a number above 0 and at most 10.", ]),
    ({"apiVersion: topwork.dev/v1alpha1": "apiVersion: topwork.dev/v1"}, ['2:13: apiVersion: "topwork.dev/v1" is not allowed. Did you mean topwork.dev/v1alpha1? Allowed: topwork.dev/v1alpha1.', ]),
    ({"  name: cats-vs-dogs\n": "  name: Cats_vs_Dogs\n"}, ['5:9: metadata.name: "Cats_vs_Dogs" is not allowed. Allowed: a DNS-1123 label: a-z, 0-9 and dash, first and last no dash, at most 40 characters.', ]),
    ({"    onCorruptImage: skip": "    onCorruptImage: skp"}, ['17:21: spec.dataset.onCorruptImage: "skp" is not allowed. Did you mean skip? Allowed: skip, fail.', ]),
    ({"application: Xception": "application: Xeption"}, ['20:20: spec.model.base.application: "Xeption" is not allowed. Did you mean Xception? Allowed: {APPLICATIONS}.', ]),
    ({"application: Xception": "application: resnet-50"}, ['20:20: spec.model.base.application: "resnet-50" is not allowed. Did you mean ResNet50? Allowed: {APPLICATIONS}.', ]),
    ({"[accuracy, top5, f1, auc]": "[accuracy, top-5, f1, auc]"}, ['37:25: spec.evaluate.metrics[1]: "top-5" is not allowed. Did you mean top5? Allowed: accuracy, top5, precision, recall, f1, auc, calibrationError.', ]),
    ({"formats: [keras, savedModel]": "formats: [keras, tf-lite]"}, ['42:50: spec.publish.formats[1]: "tf-lite" is not allowed. Did you mean tflite? Allowed: keras, savedModel, tflite, onnx.', ]),
    ({"formats: [keras, savedModel]": "formats: []"}, ["42:42: spec.publish.formats: a list of 0 is not allowed. Allowed: a list of at least 1, each keras, savedModel, tflite, onnx.", ]),
    ({"atLeast: 0.95": "atLeast: 95"}, ["39:37: spec.evaluate.gates[0].atLeast: 95 is not allowed. Allowed: a number from 0 to 1.", ]),
    ({"    memory: 32Gi": "    memory: 32"}, ["46:13: spec.compute.memory: 32 is not allowed. Allowed: a Kubernetes quantity with its unit, such as 16Gi or 500M.", ]),
    ({"    memory: 32Gi": "    memory: 32GB"}, ['46:13: spec.compute.memory: "32GB" is not allowed. Allowed: a Kubernetes quantity with its unit, such as 16Gi or 500M.', ]),
    ({"tfds: cats_vs_dogs": "tfds: Cats vs dogs"}, ['11:13: spec.dataset.source.tfds: "Cats vs dogs" is not allowed. Allowed: name[/config][:version], such as cats_vs_dogs or cats_vs_dogs:4.0.1.', ]),
    ({"s3://ml-artifacts/topwork": "gs://ml-artifacts/topwork"}, ['8:12: spec.storage: "gs://ml-artifacts/topwork" is not allowed. Allowed: s3://….', ]),
    ({"s3://ml-artifacts/topwork": "/data/topwork"}, ['8:12: spec.storage: "/data/topwork" has no scheme. Allowed: s3://….', ]),
    ({"s3://ml-artifacts/topwork": "s3://m/topwork"}, ['8:12: spec.storage: "m" is no bucket name: 3 to 63 characters of a-z, 0-9, dot and dash.', ]),
    ({"s3://ml-artifacts/topwork": "s3://ml-artifacts//topwork"}, ['8:12: spec.storage: "s3://ml-artifacts//topwork" has an empty part, . or .. in its key.', ]),
    ({"s3://ml-artifacts/topwork": "s3://key:hush-hush@ml-artifacts/topwork"}, ["8:12: spec.storage: holds a user name or password (not shown here), and a spec is stored and shared. Take it out, and hand credentials over by the environment.", ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: 'https://host/cats.zip?X-Amz-Signature=hush-hush'}"}, ["11:22: spec.dataset.source.archive.uri: is signed or holds a secret in its query (X-Amz-Signature, not shown here), and a spec is stored and shared. Copy the file to S3 and name it as s3://bucket/key.", ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: s3://bucket/cats.rar}"}, ['11:22: spec.dataset.source.archive.uri: "s3://bucket/cats.rar" does not end in one of .zip, .tar, .tar.gz, .tgz, .tar.bz2, .tbz2, .tar.xz, .txz.', ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: cats.zip, root: ../PetImages}"}, ['11:38: spec.dataset.source.archive.root: "../PetImages" climbs out of the archive. Take the .. out.', ]),
    ({"tfds: cats_vs_dogs": "archive: {uri: cats.zip, sha256: 1234}"}, ["11:40: spec.dataset.source.archive.sha256: 1234 is not allowed. Allowed: 64 hex digits in lower case, as sha256sum prints them.", ]),
    ({"tfds: cats_vs_dogs": "folder: {uri: https://host/cats/}"}, ['11:21: spec.dataset.source.folder.uri: "https://host/cats/" is not allowed. Allowed: s3://…, a local path.', ]),
    ({"tfds: cats_vs_dogs": "table: {uri: s3://bucket/labels.xlsx}"}, ['11:20: spec.dataset.source.table.uri: "s3://bucket/labels.xlsx" does not end in one of .csv, .jsonl, .ndjson.', ]),
    ({"tfds: cats_vs_dogs": "table: {uri: labels.csv, image: path, label: path}"}, ["11:52: spec.dataset.source.table.label: \"path\" is spec.dataset.source.table.image too. Name the class's own column.", ]),
    ({"pushgateway: null": "pushgateway: http://admin:hush-hush@gateway:9091"}, ["50:26: spec.metrics.pushgateway: holds a user name or password (not shown here), and a spec is stored and shared. Take it out, and hand credentials over by the environment.", ]),
    ({"onCorruptImage: skip": "onCorruptImage: https://me:hush-hush@host/a?token=hush-hush"}, ['17:21: spec.dataset.onCorruptImage: "https…host/a…" is not allowed. Allowed: skip, fail.', ]),
    ({"pushgateway: null": "pushgateway: gateway:9091"}, ['50:26: spec.metrics.pushgateway: "gateway:9091" has no scheme. Allowed: http://…, https://….', ]),
    ({"      tfds: cats_vs_dogs": "      tfds: cats_vs_dogs\n      folder: {uri: photos}"}, ["10:5: spec.dataset.source: tfds and folder are given, exactly one of tfds, folder, archive and table is needed.", ]),
    ({"      tfds: cats_vs_dogs": "      {}"}, ["11:7: spec.dataset.source: none is given, exactly one of tfds, folder, archive and table is needed.", ]),
    ({"      application: Xception\n      weights: imagenet": "      {}"}, ["20:7: spec.model.base: none is given, exactly one of application, saved and cnn is needed.", ]),
    ({"      application: Xception\n": "      saved: {uri: base.keras}\n"}, ["21:16: spec.model.base.weights: goes with application only: a saved model brings its own, a cnn starts without.", ]),
    ({"      weights: imagenet": "      weights: image-net"}, ['21:16: spec.model.base.weights: "image-net" is not allowed. Did you mean imagenet? Allowed: imagenet, none, or s3://bucket/key or a local path, ending in .h5.', ]),
    ({"      weights: imagenet": "      weights: imagenet\n      cutAt: 3"}, ["22:7: spec.model.base.cutAt: no such key. It is a key of spec.model.base.saved. Known: application, weights, saved, cnn.", ]),
    ({"      train: train[:40%]": "      train: train[40%]"}, ['13:14: spec.dataset.splits.train: "train[40%]" is no TFDS slice. Allowed: train, train[:40%], train[100:200], joined by +.', ]),
    ({"      train: train[:40%]": "      train: train[:40.5%]"}, ['13:14: spec.dataset.splits.train: "40.5%" in "train[:40.5%]" is no boundary: a whole number of images or whole percent is.', ]),
    ({"      train: train[:40%]": "      train: train[:140%]"}, ['13:14: spec.dataset.splits.train: "140%" in "train[:140%]" is beyond 100%.', ]),
    ({"      train: train[:40%]": "      train: train[60%:40%]"}, ['13:14: spec.dataset.splits.train: "train[60%:40%]" holds no image: its end is not after its start.', ]),
    ({"      train: train[:40%]": "      train: train[:30%]+train[20%:40%]"}, ["13:14: spec.dataset.splits.train: train[:30%] and train[20%:40%] overlap: an image would count twice.", ]),
    ({"      train: train[:40%]": "      train: all"}, ["13:14: spec.dataset.splits.train: 'all' takes in every split. Name the splits, such as train+test.", ]),
    ({"      train: train[:40%]": "      train: train[:45%]"}, ["14:19: spec.dataset.splits.validation: train[40%:50%] overlaps train: train[:45%], so the same images would be in both and the figures too good. Choose slices that share no image.", ]),
    ({"      test: train[50%:60%]": "      test: train[-55%:]"}, ["15:13: spec.dataset.splits.test: train[-55%:] overlaps validation: train[40%:50%], so the same images would be in both and the figures too good. Choose slices that share no image.", ]),
    ({"      train: train[:40%]\n": ""}, ["12:5: spec.dataset.splits.train: missing. Say which images train, such as train: train[:80%], or give perClass.", ]),
    ({"      validation: train[40%:50%]\n      test: train[50%:60%]\n": ""}, ["12:5: spec.dataset.splits.test: missing. Say which images the result is evaluated on, such as test: train[80%:].", "28:20: spec.transfer.earlyStopping: watches the validation loss, but there is no validation split. Add spec.dataset.splits.validation, or take earlyStopping out.", ]),
    ({"      test: train[50%:60%]": "      perClass: {train: 10, test: 5}"}, ["15:17: spec.dataset.splits.perClass: stands beside train and validation. Give either counts per class or slices, and take the other out.", ]),
    ({"      train: train[:40%]\n      validation: train[40%:50%]\n      test: train[50%:60%]\n": "      perClass: {train: 0, test: 5}\n"}, ["13:25: spec.dataset.splits.perClass.train: 0 is not allowed. Allowed: a whole number from 1.", "28:20: spec.transfer.earlyStopping: watches the validation loss, but there is no validation split. Add spec.dataset.splits.validation, or take earlyStopping out.", ]),
    ({"    train: head": "    train: all", "featureCache: auto": "featureCache: on"}, ["31:19: spec.transfer.featureCache: on needs a frozen base, but train is all. Set featureCache: auto, or train: head.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, momentum: 0.9}"}, ["28:60: spec.transfer.optimizer.momentum: 0.9 goes with rmsprop and sgd, not with adam. Take it out or change the name.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: sgd, learningRate: 0.001, nesterov: true}"}, ["28:59: spec.transfer.optimizer.nesterov: true needs momentum, which is 0. Set momentum, such as 0.9.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, clipnorm: 1, clipvalue: 1}"}, ["28:74: spec.transfer.optimizer.clipvalue: stands beside clipnorm, and Keras clips in one way only. Keep one.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: step, factor: 0.1}}"}, ["28:60: spec.transfer.optimizer.schedule.atEpochs: missing, and step needs it: Step: epochs, counted from 1, after which the rate falls.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: constant, warmupEpochs: 1}}"}, ["28:91: spec.transfer.optimizer.schedule.warmupEpochs: 1.0 goes with cosine, not with constant. Take it out or change the name.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: cosine, warmupEpochs: 20}}"}, ["28:89: spec.transfer.optimizer.schedule.warmupEpochs: 20.0 is not below epochs 20: it would end before the learning rate is reached. Try a tenth of the epochs.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: exponential, rate: 1.5}}"}, ["28:86: spec.transfer.optimizer.schedule.rate: 1.5 is not below 1: the rate would never fall. Try 0.9.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: step, factor: 0.1, atEpochs: [9, 5]}}"}, ["28:100: spec.transfer.optimizer.schedule.atEpochs[1]: 5 is not after 9, which stands before it. Sort the list.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, schedule: {name: step, factor: 0.1, atEpochs: [9, 30]}}"}, ["28:100: spec.transfer.optimizer.schedule.atEpochs[1]: 30 is not before the last epoch, 20: the step would never come. Take it out.", ]),
    ({"    loss: auto": "    loss: {name: sparseCategoricalCrossentropy, labelSmoothing: 0.1}"}, ["29:65: spec.transfer.loss.labelSmoothing: 0.1 can't be had with sparseCategoricalCrossentropy, whose labels are class numbers. Name categoricalCrossentropy, which learns the same otherwise.", ]),
    ({"    loss: auto": "    loss: {name: auto, gamma: 3}"}, ["29:31: spec.transfer.loss.gamma: 3.0 goes with focal, not with auto. Take it out or name focal.", ]),
    ({"    epochs: 10\n": ""}, ["32:3: spec.fineTune.epochs: missing. Epochs at most of this stage.", ]),
    ({"    unfreeze: all": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 1e-5}]}"}, ["33:13: spec.fineTune.epochs: 10 stands beside unfreeze.steps, which have their own. Take it out.", ]),
    ({"    epochs: 10\n    unfreeze: all": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 1e-5}, {layers: 4, epochs: 2, learningRate: 1e-6}]}"}, ["33:77: spec.fineTune.unfreeze.steps[1].layers: 4 is not above 4 of the step before. Layers are counted from the top each time, so every step names more.", ]),
    ({"    epochs: 10\n    unfreeze: all\n    optimizer: {name: adam, learningRate: 1.0e-5}": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 1e-5}]}\n    optimizer: {schedule: {name: cosine, warmupEpochs: 2}}"}, ["34:56: spec.fineTune.optimizer.schedule.warmupEpochs: 2.0 is not below epochs 2 of the shortest step: it would end before the learning rate is reached. Try a tenth of the epochs.", ]),
    ({"{name: adam, learningRate: 1.0e-5}": "{name: adam}"}, ["35:16: spec.fineTune.optimizer.learningRate: missing. An optimizer of its own would begin at 0.001, which suits a new head and washes out pretrained weights. Try 1e-05.", ]),
    ({"    batchSize: 64": "    batchSize: 65"}, ["27:16: spec.transfer.batchSize: 65 is not divisible by spec.compute.gpus 2: each replica takes an equal part of the global batch. Try 64 or 66.", ]),
    ({"    gpus: 2": "    gpus: 3"}, ["27:16: spec.transfer.batchSize: 64 is not divisible by spec.compute.gpus 3: each replica takes an equal part of the global batch. Try 63 or 66.", ]),
    ({"    unfreeze: all": "    unfreeze: all\n    batchSize: 1"}, ["35:16: spec.fineTune.batchSize: 1 is not divisible by spec.compute.gpus 2: each replica takes an equal part of the global batch. Try 2.", ]),
    ({"{name: adam, learningRate: 0.001}": "{name: adam, learningRate: 0.001, gradientAccumulationSteps: 4}"}, ["28:77: spec.transfer.optimizer.gradientAccumulationSteps: 4 can't be had with spec.compute.gpus 2: Keras crashes when it accumulates gradients over several replicas (keras#20582). Take it out, or set gpus: 1.", ]),
    ({"{name: adam, learningRate: 1.0e-5}": "{name: adam, learningRate: 1.0e-5, globalClipnorm: 1.0}"}, ["35:67: spec.fineTune.optimizer.globalClipnorm: 1.0 can't be had with spec.compute.gpus 2: each replica would clip its own gradients before they are summed. Use clipvalue, or set gpus: 1.", ]),
    ({"{name: adam, learningRate: 1.0e-5}": "{name: adam, learningRate: 0.1}"}, ["35:43: spec.fineTune.optimizer.learningRate: 0.1 is above spec.transfer.optimizer.learningRate 0.001: a larger step washes out pretrained weights. Try a tenth of it, 0.0001.", ]),
    ({"    epochs: 10\n    unfreeze: all": "    unfreeze: {steps: [{layers: 4, epochs: 2, learningRate: 0.01}]}"}, ["33:61: spec.fineTune.unfreeze.steps[0].learningRate: 0.01 is above spec.transfer.optimizer.learningRate 0.001: a larger step washes out pretrained weights. Try a tenth of it, 0.0001.", ]),
    ({"      validation: train[40%:50%]\n": ""}, ["29:20: spec.transfer.earlyStopping: watches the validation loss, but there is no validation split. Add spec.dataset.splits.validation, or take earlyStopping out.", ]),
    ({"    imageSize: [150, 150]": "    imageSize: [150, 64]"}, ["16:22: spec.dataset.imageSize[1]: 64 is too small for Xception: at least 71 pixels a side.", ]),
    ({"      application: Xception\n      weights: imagenet": "      cnn: {filters: [32, 64]}"}, ["24:12: spec.transfer.train: head would keep a base frozen that has learnt nothing: cnn starts from random weights. Set train: all.", ]),
    ({"rotation: 0.1}": "rotation: 0.1, mixUp: 0.2, cutMix: 1.0}"}, ["23:71: spec.augmentation.cutMix: stands beside mixUp, and both mix the same images and labels. Set one of them to 0.", ]),
    ({"rotation: 0.1}": "rotation: 0.1, mixUp: 0.2}", "loss: auto": "loss: sparseCategoricalCrossentropy"}, ["23:58: spec.augmentation.mixUp: 0.2 mixes two labels, and sparseCategoricalCrossentropy takes one class number. Name categoricalCrossentropy or auto in spec.transfer.loss, or set mixUp to 0.", ]),
    ({"atLeast: 0.95": "atMost: 0.5, atLeast: 0.9"}, ["39:36: spec.evaluate.gates[0].atMost: 0.5 is below atLeast 0.9. No model can meet both.", ]),
    ({"{metric: accuracy, atLeast: 0.95}": "{metric: accuracy}"}, ["39:9: spec.evaluate.gates[0]: has no condition. Give at least one of atLeast, atMost and atLeastLatestMinus.", ]),
    ({"{metric: accuracy, atLeast: 0.95}": "{metric: recall, atLeast: 0.95}"}, ["39:18: spec.evaluate.gates[0].metric: recall is not among spec.evaluate.metrics: accuracy, top5, f1, auc. Add it there.", ]),
    ({"{metric: accuracy, atLeast: 0.95}": "{metric: calibrationError, atLeast: 0.95}"}, ["39:45: spec.evaluate.gates[0].atLeast: 0.95 asks for a large calibrationError, but small is good. Use atMost.", ]),
    ({"[accuracy, top5, f1, auc]": "[accuracy, top5, f1, auc, f1]"}, ["37:40: spec.evaluate.metrics[4]: f1 is named twice. Take one out.", ]),
    ({"    sharedMemory: 2Gi": "    sharedMemory: 64Gi"}, ["47:19: spec.compute.sharedMemory: 64Gi is not below spec.compute.memory 32Gi, of which it is a part. Raise memory or lower sharedMemory.", ]),
    ({"operator: Exists,": "operator: Exist,"}, ['49:51: spec.compute.tolerations[0].operator: "Exist" is not allowed. Did you mean Exists? Allowed: Equal, Exists.', ]),
    ({"operator: Exists,": "operator: Exists, value: a, second: 3,"}, ["49:66: spec.compute.tolerations[0].value: operator Exists takes no value. Leave one of the two out.", "49:77: spec.compute.tolerations[0].second: no such key. Known: key, operator, value, effect, tolerationSeconds.", ]),
    ({'{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}': "{effect: NoSchedule, tolerationSeconds: '3'}"}, ["49:19: spec.compute.tolerations[0]: no key. Name the taint's key, or bear all taints with {operator: Exists}.", '49:59: spec.compute.tolerations[0].tolerationSeconds: "3" is not allowed. Allowed: a whole number.', "49:59: spec.compute.tolerations[0].tolerationSeconds: goes with effect NoExecute only. Take it out, or change effect.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAfinity: {}}"}, ["48:29: spec.compute.affinity.nodeAfinity: no such key. Did you mean nodeAffinity? Known: nodeAffinity, podAffinity, podAntiAffinity.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: zone-a"}, ['48:15: spec.compute.affinity: "zone-a" is not allowed. Allowed: a mapping.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: zone-a}"}, ['48:30: spec.compute.affinity.nodeAffinity: "zone-a" is not allowed. Allowed: a mapping.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: null}"}, ["48:30: spec.compute.affinity.nodeAffinity: null is not allowed. Allowed: a mapping.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerm: []}}}"}, ["48:79: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution: has no nodeSelectorTerms, which Kubernetes needs here.", "48:98: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerm: no such key. Did you mean nodeSelectorTerms? Known: nodeSelectorTerms.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: gpu, operator: in, values: [a100]}]}]}}}"}, ['48:141: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].operator: "in" is not allowed. Did you mean In? Allowed: In, NotIn, Exists, DoesNotExist, Gt, Lt.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: gpu, operator: Gt, values: [7]}]}]}}}"}, ["48:154: spec.compute.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].values[0]: 7 is not allowed. Allowed: text, in quotes.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 200, preference: {}}]}}"}, ["48:90: spec.compute.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight: 200 is not allowed. Allowed: a whole number from 1 to 100.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: {weight: 20, preference: {}}}}"}, ['48:80: spec.compute.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution: a mapping with "weight" and "preference" is not allowed. Allowed: a list.', ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {podAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{labelSelector: {matchLabels: {app: 1}}}]}}"}, ["48:79: spec.compute.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0]: has no topologyKey, which Kubernetes needs here.", "48:115: spec.compute.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].labelSelector.matchLabels.app: 1 is not allowed. Allowed: text, in quotes.", ]),
    ({"    nodeSelector: {gpu: a100}": "    affinity: {podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: zone, labelSelector: {matchExpressions: [{key: a, operator: Gt}]}}]}}"}, ['48:157: spec.compute.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].labelSelector.matchExpressions[0].operator: "Gt" is not allowed. Allowed: In, NotIn, Exists, DoesNotExist.', ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: [registry, registry]"}, ["48:34: spec.compute.imagePullSecrets[1]: registry is named twice. Take one out.", ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: [Registry]"}, ['48:24: spec.compute.imagePullSecrets[0]: "Registry" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: registry"}, ['48:23: spec.compute.imagePullSecrets: "registry" is not allowed. Allowed: a list of up to 16, each the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    imagePullSecrets: [{name: registry}]"}, ['48:24: spec.compute.imagePullSecrets[0]: a mapping with "name" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    annotations: {-team: vision}"}, ['48:19: spec.compute.annotations.-team: "-team" is not allowed here. Allowed: a Kubernetes annotation key: [prefix/]name, the name of at most 63 letters, digits, dash, underscore and dot.', ]),
    ({"    nodeSelector: {gpu: a100}": "    annotations: {team: 7}"}, ["48:25: spec.compute.annotations.team: 7 is not allowed. Allowed: text, in quotes if it is a number or true or false.", ]),
    ({"    nodeSelector: {gpu: a100}": "    annotations: {a/b/c: vision}"}, ['48:19: spec.compute.annotations.a/b/c: "a/b/c" is not allowed here. Allowed: a Kubernetes annotation key: [prefix/]name, the name of at most 63 letters, digits, dash, underscore and dot.', ]),
    ({"    nodeSelector: {gpu: a100}": f"    annotations: {{team: {'x' * 70000}}}"}, ["48:18: spec.compute.annotations: 70004 bytes in all are more than 65536. Keep large texts elsewhere.", ]),
    ({"    nodeSelector: {gpu: a100}": "    serviceAccountName: Trainer"}, ['48:25: spec.compute.serviceAccountName: "Trainer" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    serviceAccountName: a..b"}, ['48:25: spec.compute.serviceAccountName: "a..b" is not allowed. Allowed: the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCA: company-ca"}, ['48:14: spec.compute.extraCA: "company-ca" is not allowed. Allowed: a mapping with configMap, key.', ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCA: {key: ca.crt}"}, ["48:14: spec.compute.extraCA.configMap: missing. Name of the ConfigMap. Allowed: the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters.", ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCA: {configMap: company-ca, key: ../ca.crt}"}, ['48:43: spec.compute.extraCA.key: "../ca.crt" is not allowed. Allowed: a key of a ConfigMap: letters, digits, dash, underscore and dot, at most 253 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    extraCa: {configMap: company-ca}"}, ["48:5: spec.compute.extraCa: no such key. Did you mean extraCA? Known: gpus, cpu, memory, sharedMemory, scratch, precision, queue, deadlineSeconds, retries, ttlSecondsAfterFinished, nodeSelector, tolerations, affinity, priorityClassName, serviceAccountName, imagePullSecrets, annotations, extraCA, prefetch, terminationGracePeriodSeconds, checkpointMinutes.", ]),
    ({"    nodeSelector: {gpu: a100}": "    prefetch: yes"}, ['48:15: spec.compute.prefetch: "yes" is not allowed. Did you mean true? Allowed: true or false.', ]),
    ({"    nodeSelector: {gpu: a100}": "    terminationGracePeriodSeconds: 10"}, ["48:36: spec.compute.terminationGracePeriodSeconds: 10 is not allowed. Allowed: a whole number from 30 to 3600.", ]),
    ({"    nodeSelector: {gpu: a100}": "    terminationGracePeriodSeconds: 5m"}, ['48:36: spec.compute.terminationGracePeriodSeconds: "5m" is not allowed. Allowed: a whole number from 30 to 3600.', ]),
    ({"    nodeSelector: {gpu: a100}": "    priorityClassName: -high"}, ['48:24: spec.compute.priorityClassName: "-high" is not allowed. Allowed: a Kubernetes name: a-z, 0-9, dash and dot, at most 63 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    queue: team..a"}, ['48:12: spec.compute.queue: "team..a" is not allowed. Allowed: a Kubernetes name: a-z, 0-9, dash and dot, at most 63 characters.', ]),
    ({"    nodeSelector: {gpu: a100}": "    nodeSelector: {a..b/gpu: a100}"}, ['48:20: spec.compute.nodeSelector.a..b/gpu: "a..b/gpu" is not allowed here. Allowed: a Kubernetes label key: [prefix/]name, the name of at most 63 letters, digits, dash, underscore and dot.', ]),
    ({"{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}": "{key: a, operator: Exists, effect: NoSchedule, tolerationSeconds: 3}"}, ["49:85: spec.compute.tolerations[0].tolerationSeconds: goes with effect NoExecute only. Take it out, or change effect.", ]),
    ({"  seed: 42": "\tseed: 42"}, ["51:1: a tab stands where YAML wants spaces to indent. Replace it by spaces.", ]),
    ({"  seed: 42": "  seed: [42"}, ["52:1: is no YAML: while parsing a flow sequence; expected ',' or ']', but got '<stream end>'.", ]),
    ({"  seed: 42": "  seed: *none"}, ["51:9: is no YAML: found undefined alias 'none'.", ]),
    ({"  seed: 42": "  seed: !!python/object:os.system 42"}, ['51:9: spec.seed: the tag "tag:yaml.org,2002:python/object:os.system" is not allowed. Leave it out.', ]),
    ({"  seed: 42": "  seed: &me [*me]"}, ["51:9: spec.seed[0]: the alias stands inside of what it repeats.", ]),
    ({"  seed: 42": '  seed: "\\uD800"'}, ["51:9: spec.seed: holds half of a surrogate pair, which is no character.", ]),
    ({"  seed: 42": "  seed: 99999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999999"}, ["51:9: spec.seed: a number of 101 characters is more than anything here takes.", ]),
    ({"  seed: 42": "  seed: 42\n  : 7"}, ["52:3: spec.: a key is text, and here stands nothing. Put quotes around it.", ]),
    ({"  seed: 42": "  seed: 4\u00002"}, ['51:10: the character "\\u0000" is not allowed in YAML.', ]),
]


def changed(changes: dict[str, str]) -> str:
    text = GOOD
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    return text


def test_good_spec_is_read() -> None:
    assert [job.metadata.name for job in read_text(GOOD, "job.yaml")] == ["cats-vs-dogs"]


@pytest.mark.parametrize(("changes", "told"), WRONG, ids=[told[0][:60] for _, told in WRONG])
def test_wrong_spec_is_told_with_place_and_words(changes: dict[str, str], told: list[str]) -> None:
    with pytest.raises(WrongSpec) as caught:
        read_text(changed(changes), "job.yaml")
    expected = [line.replace("{APPLICATIONS}", APPLICATIONS) for line in told]
    assert [str(problem) for problem in caught.value.problems] == [f"job.yaml:{line}" for line in expected]


def test_all_changes_that_can_be_made_at_once_are_told_at_once() -> None:
    text = changed(
        {
            "name: cats-vs-dogs": "name: Cats",
            "train[40%:50%]": "train[30%:50%]",
            "epochs: 20": "epochs: twenty",
            "gpus: 2": "gpus: 3",
            "atLeast: 0.95": "atLest: 0.95",
            "learningRate: 1.0e-5": "learningRate: 0.1",
        }
    )
    with pytest.raises(WrongSpec) as caught:
        read_text(text, "job.yaml")
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (5, "metadata.name"),
        (14, "spec.dataset.splits.validation"),
        (26, "spec.transfer.epochs"),
        (27, "spec.transfer.batchSize"),
        (35, "spec.fineTune.optimizer.learningRate"),
        (39, "spec.evaluate.gates[0].atLest"),
    ]


def test_no_message_shows_a_secret() -> None:
    assert not [told for _, told in WRONG if "hush-hush" in "".join(told)]
